"""A saved model and a data set -> probabilities and scores (python -m cifar10_trainer.evaluate).

    python -m cifar10_trainer.evaluate --workdir RUN --show 4
    python -m cifar10_trainer.evaluate --model FILE --dataset folder --data_dir PICTURES --views 6

The model is a plain Keras file. TensorFlow is imported only after all arguments have been checked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from . import cli, datasets, measures, report
from .config import DATASETS, RESIZES, check_views
from .datasets.arrays import SOURCE as ARRAYS
from .datasets.arrays import check_images, check_labels, pair
from .datasets.folder import is_cut
from .errors import ConfigError, RunError, check_number, cut
from .files import expanded
from .keras_state import keras_defaults
from .model_file import check_model_file, info_of, load_model
from .run_folder import RunFolder, existing
from .scoring import check_model, predict_probabilities, score, takes

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

SPLITS = ("test", "validation", "train")

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
_define = cli.definer(FLAGS, "python -m cifar10_trainer.evaluate")

_define(flags.DEFINE_string, "workdir", "a run folder; its model is scored on its data set")
_define(flags.DEFINE_string, "model", "a .keras or .h5 file, instead of --workdir")
_define(flags.DEFINE_enum, "dataset", "default: the run's, else cifar10", enum_values=DATASETS)
_define(flags.DEFINE_string, "data_dir", "where the data set is; default: the run's")
_define(
    flags.DEFINE_enum, "resize", "how a folder's images are resized; default: as the run did, else squash",
    enum_values=RESIZES,
)  # fmt: skip
cli.define_folder_options(_define)
_define(
    flags.DEFINE_enum, "split", "the images to score; default: test, or validation if there are no test images",
    enum_values=SPLITS,
)  # fmt: skip
_define(
    flags.DEFINE_enum, "views", "views for test-time augmentation; default: the run's, else 1",
    enum_values=("1", "2", "6"),
)  # fmt: skip
_define(
    flags.DEFINE_float, "views_share",
    "the share of the images, those of which the model is least sure, that get the further views; default: the run's, else 1",
)  # fmt: skip
_define(
    flags.DEFINE_integer, "batch_size", "images in a batch; default: 500 of 32x32 pixels, fewer of larger ones",
    lower_bound=1,
)  # fmt: skip
_define(flags.DEFINE_integer, "show", "print the predictions for the first N images", 0, lower_bound=0)
_define(flags.DEFINE_boolean, "json", "print one JSON object", False)

USAGE = """usage: python -m cifar10_trainer.evaluate --workdir=RUN | --model=FILE [flags]

Scores a saved model on a data set.
Examples:
  python -m cifar10_trainer.evaluate --workdir=runs/mine --show=4
  python -m cifar10_trainer.evaluate --model=model.keras --dataset=folder --data_dir=pictures --views=6"""


@keras_defaults()
def evaluate_model(
    model: keras.Model,
    data: datasets.Dataset | tuple[np.ndarray, np.ndarray] | tf.data.Dataset,
    *,
    views: int = 1,
    views_share: float = 1.0,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Scores a model, with test-time augmentation where `views` is above 1; see `scoring.predict_probabilities`.

    Args:
        model: maps raw pixels [batch, height, width, 3] to probabilities [batch, classes].
        data: a data set, whose test images are scored, (images uint8 [n, height, width, 3], labels integers [n]), or a finite
            `tf.data.Dataset` of such pairs.
        views: 1, 2 or 6.
        views_share: the share of the images, those of which the model is least sure, that get the further views.
        batch_size: images in a batch; None: 500 of 32x32 pixels, fewer of larger ones.

    Returns:
        {"accuracy": 0-1, "loss": the mean cross-entropy in nats, "n": the number of images}.
    Raises:
        ConfigError: if an argument has another type or range, or if the images do not fit the model or there are none.
        RunError: if the outputs are not probabilities.
    """
    check_model(model)
    if batch_size is not None:
        check_number("batch_size", batch_size, Integral, 1, words="1 or more, or None")
    if isinstance(data, datasets.Dataset):
        check_fit(model, data)
        if len(data.test_labels) == 0:
            raise ConfigError(
                f"{data.source} has no test images; allowed: a Dataset that has, or (images, labels)"
            )
        data = data.test_images, data.test_labels
    pixels, true = pair("evaluation", data)
    images = check_images("images", pixels)
    labels, count = check_labels("labels", true, len(images))
    expected, classes = tuple(model.input_shape[1:]), model.output_shape[-1]
    if len(images) == 0 or not takes(model, images.shape[1:]) or count > classes:
        raise ConfigError(
            f"images has shape {images.shape} and labels has {count} classes; allowed: {('n', *expected)} with n above 0,"
            f" and at most {classes} classes"
        )
    return score(labels, predict_probabilities(model, images, batch_size, views, views_share))


def check_fit(model: keras.Model, dataset: datasets.Dataset) -> None:
    """Raises ConfigError where the model takes other images, or has another number of classes."""
    needs = tuple(model.input_shape[1:]), model.output_shape[-1]
    has = tuple(dataset.input_shape), dataset.num_classes
    if not takes(model, has[0]) or needs[1] != has[1]:
        raise ConfigError(
            f"the model takes images {needs[0]} of {needs[1]} classes, but data set {dataset.name!r} has"
            f" images {has[0]} of {has[1]} classes; allowed: the data set it was trained on (--dataset, --data_dir)"
        )


def read_run(workdir: str | Path) -> dict[str, Any]:
    """The config.json of a run folder. Raises ConfigError without a folder, RunError without its files."""
    folder = existing(workdir)
    if not folder.config_file.is_file():
        raise ConfigError(
            f"{folder} is no run folder: it has no {folder.config_file.name}; allowed: one written by"
            " python -m cifar10_trainer, of a cross-validation one of its folds"
        )
    if not folder.model_file.is_file():
        raise RunError(
            f"{folder} has no {folder.model_file.name}; finish the run with the command that began it"
        )
    return folder.read_config()


def select(dataset: datasets.Dataset, name: str, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of the split `name`.

    Args:
        dataset: what to select from.
        name: "test", "validation" or "train".
        settings: validation_fraction, validation_split, validation_fold, seed and fingerprint of the run, which determine
            its training and validation images. Empty: all training images are "train".

    Raises:
        ConfigError: if the split is empty, or `dataset` does not hold the images of the run.
    """
    if name == "test":
        images, labels = dataset.test_images, dataset.test_labels
        held_out = dataset.validation is not None or settings.get("validation_fraction") is not None
        allowed = "validation, train" if held_out else "train"
    else:
        if "fingerprint" in settings and settings["fingerprint"] != datasets.fingerprint(dataset):
            raise ConfigError(
                f"split is {name!r}, but {dataset.source} does not hold the images of the run; allowed: test,"
                " the run's own images (--data_dir), or --model with its model.keras"
            )
        fraction, kind = settings.get("validation_fraction"), settings.get("validation_split", "stratified")
        fold = settings.get("validation_fold", 0)
        parts = datasets.split(dataset, fraction, kind, settings.get("seed", 0), fold)
        images, labels = parts[:2] if name == "train" else parts[2:]
        allowed = "test, train; or --workdir with a run that held images out"
    if len(labels) == 0:
        raise ConfigError(
            f"split is {name!r}, but there are no such images in {dataset.name!r}; allowed: {allowed}"
        )
    return images, labels


def default_split(dataset: datasets.Dataset, settings: dict[str, Any]) -> str:
    """Chooses "test" or, where there are no test images but validation images, "validation", with a note on stderr."""
    same_images = bool(settings) and settings.get("fingerprint") in (None, datasets.fingerprint(dataset))
    held_out = dataset.validation is not None or (
        same_images and settings.get("validation_fraction") is not None
    )
    if len(dataset.test_labels) or not held_out:
        return "test"
    chose = "; the run chose its weights on them" if same_images else ""
    print(f"{dataset.source} has no test images: these are its validation images{chose}", file=sys.stderr)
    return "validation"


def load_images(
    name: str, data_dir: str | None, size: int, resize: str, settings: dict[str, Any]
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """The data set to score, and the settings that say which of its images are the run's.

    Of a run on a folder, its files are read, each in the part in which the run used it. Newer files are ignored, and missing ones are
    left out. Where --data_dir names a folder with none of the run's files, or the run was on other data, all pictures of <class>/*
    are scored. Without a run (--model), only the fifth of each class is scored on which a training on this folder would
    test: the model may have been trained on the others.

    Args:
        name, data_dir: of the data set.
        size: the side of the model's images.
        resize: how the pictures of a folder get it.
        settings: of the run; empty: none. They are returned, but for a folder of which the run saw no picture: for that, none.
    """
    if name != "folder":  # the others have one size
        flag = FLAGS.resize or "squash"  # `datasets.load` refuses another one
        return datasets.load(name, data_dir, resize=flag, **cli.folder_options(FLAGS)), settings
    rows = RunFolder(FLAGS.workdir).read_split() if settings else None
    # The run saw none of these pictures, so all of <class>/* may be scored.
    unseen = bool(settings) and settings.get("data_name", settings.get("dataset")) != "folder"
    there = rows or []
    if rows and data_dir:
        root = expanded(data_dir)
        there = [row for row in rows if (root / row[0]).exists()]
        if 0 < len(there) < len(rows):
            print(
                f"{data_dir} lacks {len(rows) - len(there):,} of the run's {len(rows):,} pictures; of the others each stays in"
                " its part",
                file=sys.stderr,
            )
        elif not there and FLAGS.data_dir:
            print(f"{data_dir} has none of the run's pictures: it is a data set of its own", file=sys.stderr)
            rows, unseen = None, True
    if rows:
        where = RunFolder(FLAGS.workdir).split_file
        print(
            f"the images are the files that {where} names; files that came later are in no part",
            file=sys.stderr,
        )
    scores_test = FLAGS.split in (None, "test")
    has_test = any(part == "test" for *_, part in there)
    only = "test" if scores_test and has_test else None  # the other parts need not be read
    parts = {"files": rows, "skip_gone": bool(there), "only": only, "cut": not (unseen and scores_test)}
    found = datasets.load(name, data_dir, size, resize, **parts, **cli.folder_options(FLAGS))
    if not rows and not unseen and scores_test and is_cut(found):
        print(
            f"{found.source}: a fifth of each class is scored, the test images of a training on this folder; to score all, move"
            " the classes into test/, beside a train/ with the same ones",
            file=sys.stderr,
        )
    return found, {} if unseen else settings


def measured(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """`score`, with the balanced accuracy and the 95% interval of the accuracy. Arguments as of `score`."""
    numbers, classes = score(labels, probabilities), probabilities.shape[1]
    return {
        **numbers,
        "balanced_accuracy": measures.balanced_accuracy(labels, probabilities.argmax(axis=1), classes),
        "accuracy_interval": list(measures.wilson_interval(numbers["accuracy"], numbers["n"])),
    }


def first_predictions(
    labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """The predictions for the first `count` images.

    Args:
        labels: integers [n].
        probabilities: float [n, classes].
        class_names: one for each class.
        count: how many.

    Returns:
        for each image {"image": its number from 0, "true": class name, "predicted": class name, "probability": that of
        the predicted class, 0-1}.
    """
    return [
        {
            "image": i,
            "true": class_names[label],
            "predicted": class_names[row.argmax()],
            "probability": float(f"{row.max():.6g}"),
        }
        for i, (label, row) in enumerate(zip(labels[:count], probabilities[:count], strict=True))
    ]


def main() -> None:
    if (FLAGS.workdir is None) == (FLAGS.model is None):
        raise ConfigError("name the model; allowed: exactly one of --workdir RUN and --model FILE")

    # ---- what to evaluate
    settings: dict[str, Any] = {} if FLAGS.workdir is None else read_run(FLAGS.workdir)
    path = check_model_file(FLAGS.model or RunFolder(FLAGS.workdir).model_file)
    if settings.get("data_source") == ARRAYS and FLAGS.dataset is None:
        raise ConfigError(
            f"{FLAGS.workdir} was trained on arrays in memory, which no command can read again; allowed: --dataset with"
            " images to score, or evaluate_model in Python"
        )
    trained_on = settings.get("data_name") or settings.get("dataset", "cifar10")
    name = FLAGS.dataset or trained_on
    data_dir = FLAGS.data_dir or (settings.get("data_dir") if name == trained_on else None)
    tta: dict[str, Any] = {"views": int(FLAGS.views or settings.get("views", 1))}
    tta["views_share"] = settings.get("views_share", 1) if FLAGS.views_share is None else FLAGS.views_share
    check_views(**tta)

    # ---- the model and images that fit it
    datasets.read_ahead(name, data_dir)
    cli.import_tensorflow()
    model = load_model(path)
    info = info_of(model)
    if (
        FLAGS.workdir is None
        and FLAGS.dataset is None
        and info.class_names not in ((), datasets.CIFAR10_CLASSES)
    ):
        raise ConfigError(
            f"{path} was trained on {cut(', '.join(info.class_names))}, not on CIFAR-10; allowed: --dataset, and for a folder"
            " --data_dir"
        )
    resize = FLAGS.resize or (info.resize if info.class_names else settings.get("resize", "squash"))
    dataset, seen = load_images(name, data_dir, model.input_shape[1], resize, settings)
    check_fit(model, dataset)
    classes = list(settings.get("class_names") or info.class_names or dataset.class_names)
    # Arrays without names of classes have numbers, and so have digits, whose names they are.
    numbers_are_no_names = not settings or settings.get("data_source") == ARRAYS
    nameless = numbers_are_no_names and classes == [str(k) for k in range(len(classes))]
    if not nameless and list(dataset.class_names) != classes:
        raise ConfigError(
            f"data set {name!r} has classes {cut(', '.join(dataset.class_names))}, but the model was trained on"
            f" {cut(', '.join(map(str, classes)))}; allowed: the data set it was trained on (--dataset, --data_dir)"
        )
    split = FLAGS.split or default_split(dataset, seen)
    images, labels = select(dataset, split, seen)

    # ---- the scores
    probabilities = predict_probabilities(model, images, FLAGS.batch_size, **tta)
    numbers = measured(labels, probabilities)
    predictions = first_predictions(labels, probabilities, dataset.class_names, FLAGS.show)
    if FLAGS.json:
        about = {"model": str(path), "dataset": name, "source": dataset.source, "split": split}
        print(json.dumps({**about, **tta, **numbers, **({"first": predictions} if predictions else {})}))
        return
    print(
        f"{path} on {numbers['n']:,} {split} images of {name} ({dataset.source}), {measures.views_in_words(tta)}"
    )
    interval = measures.interval_in_words(numbers["accuracy"], numbers["n"])
    balanced = "" if name in report.BALANCED else f"   balanced accuracy {numbers['balanced_accuracy']:.4f}"
    print(
        f"accuracy {numbers['accuracy']:.4f}{f' ({interval})' if interval else ''}   loss {numbers['loss']:.4f}{balanced}\n"
    )
    for a in predictions:
        print(f"image {a['image']}: {a['true']}, predicted {a['predicted']} ({a['probability']:.4f})")
    print(
        ("\n" if predictions else "")
        + report.classification_report(labels, probabilities.argmax(axis=1), dataset.class_names)
    )


def command() -> int:
    return cli.run(main, FLAGS, USAGE)


if __name__ == "__main__":
    sys.exit(command())
