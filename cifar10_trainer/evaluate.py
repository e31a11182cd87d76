"""A saved model and a data set -> probabilities and scores (python -m cifar10_trainer.evaluate).

    python -m cifar10_trainer.evaluate --workdir RUN --show 4
    python -m cifar10_trainer.evaluate --model FILE --dataset folder --data_dir PICTURES --views 6

The model is a plain Keras file; TensorFlow is imported when there is something to compute.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from . import cli, datasets, report
from .config import DATASETS
from .errors import ConfigError, RunError
from .run_folder import RunFolder
from .scoring import BATCH_SIZE, predict_probabilities, score

if TYPE_CHECKING:
    import keras

SPLITS = ("test", "validation", "train")

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
flags.DEFINE_string("workdir", None, "a run folder: its model, data set and settings", flag_values=FLAGS)
flags.DEFINE_string("model", None, "a .keras or .h5 file, instead of --workdir", flag_values=FLAGS)
flags.DEFINE_enum("dataset", None, DATASETS, "default: the run's, else cifar10", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "where the data set is; default: the run's", flag_values=FLAGS)
flags.DEFINE_enum("split", "test", SPLITS, "the images to score", flag_values=FLAGS)
flags.DEFINE_enum(
    "views", None, ("1", "2", "6"), "views to average over; default: the run's, else 1", flag_values=FLAGS
)
flags.DEFINE_integer("batch_size", BATCH_SIZE, "images at once", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "show", 0, "show what the model says to the first so many images", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_boolean("json", False, "print one JSON object", flag_values=FLAGS)

USAGE = (
    "python -m cifar10_trainer.evaluate --workdir RUN | --model FILE [flags]\n\n"
    "Scores a saved model on a data set."
)


def load_model(path: str | Path) -> keras.Model:
    """Opens a saved classifier of images, uncompiled, with Keras's safe mode on.

    Its input is [batch, height, width, 3] with a fixed height and width, its output [batch, classes].
    Raises ConfigError when there is no such file or the model is of another kind, RunError when the file does
    not open as a model.
    """
    path = check_model_file(path)
    import keras

    try:
        if path.suffix.lower() == ".keras" and not zipfile.is_zipfile(path):
            raise ValueError("it is damaged, or no such file: a .keras file is a zip archive")
        model = keras.models.load_model(path, compile=False)
    except Exception as error:
        # Keras raises whatever the reader of the day raises.
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path} does not open as a Keras model ({reason}); train it again") from error
    received: Any = getattr(model, "input_shape", None)
    given: Any = getattr(model, "output_shape", None)
    if not (_is_shape(received, 4) and received[3] == 3 and _is_shape(given, 2)):
        raise ConfigError(
            f"the model in {path} maps {received} to {given};"
            " allowed: one that maps (batch, height, width, 3) to (batch, classes)"
        )
    return model


def check_model_file(path: str | Path) -> Path:
    """`path`, without importing TensorFlow. Raises ConfigError when no model can be there."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no model file at {path}; allowed: a .keras or .h5 file, such as RUN/model.keras")
    if path.suffix.lower() not in (".keras", ".h5", ".hdf5"):
        raise ConfigError(f"the model file is {path}; allowed: a name that ends in .keras, .h5 or .hdf5")
    return path


def _is_shape(shape: Any, rank: int) -> bool:
    return isinstance(shape, tuple) and len(shape) == rank and all(isinstance(n, int) for n in shape[1:])


def check_fit(model: keras.Model, dataset: datasets.Dataset) -> None:
    """Raises ConfigError when the model is made for other images or another number of classes."""
    needs = tuple(model.input_shape[1:]), model.output_shape[-1]
    has = tuple(dataset.input_shape), dataset.num_classes
    if needs != has:
        raise ConfigError(
            f"the model takes images {needs[0]} of {needs[1]} classes, but data set {dataset.name!r} has"
            f" images {has[0]} of {has[1]} classes; name the data it was trained on (--dataset, --data_dir)"
        )


def read_run(workdir: str | Path) -> dict[str, Any]:
    """The config.json of a run folder. Raises ConfigError without a folder, RunError without its files."""
    folder = RunFolder(workdir)
    if not folder.path.is_dir():
        raise ConfigError(f"no run folder at {folder}; allowed: one written by python -m cifar10_trainer")
    for file in (folder.config_file, folder.model_file):
        if not file.is_file():
            raise RunError(f"{folder} has no {file.name}; finish the run by the command that began it")
    return folder.read_config()


def select(dataset: datasets.Dataset, name: str, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of split `name`; training and validation images are parted as `settings` say.

    settings: validation_fraction, _split and _fold, seed and fingerprint of the run; without them all training images
    are for training. Raises ConfigError when the split is empty, or the images that the run parted were others.
    """
    if name == "test":
        images, labels = dataset.test_images, dataset.test_labels
        others = "validation, train"
    else:
        if "fingerprint" in settings and settings["fingerprint"] != datasets.fingerprint(dataset):
            raise ConfigError(
                f"split is {name!r}, but {dataset.source} does not hold the images that the run parted; allowed: test,"
                " its own images (--data_dir), or --model with its model.keras"
            )
        fraction, kind = settings.get("validation_fraction"), settings.get("validation_split", "stratified")
        fold = settings.get("validation_fold", 0)
        parts = datasets.split(dataset, fraction, kind, settings.get("seed", 0), fold)
        images, labels = parts[:2] if name == "train" else parts[2:]
        others = "test, train; or --workdir with the run that parted the training images"
    if len(labels) == 0:
        raise ConfigError(
            f"split is {name!r}, but there are no such images in {dataset.name!r}; allowed: {others}"
        )
    return images, labels


def first_answers(
    labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """For each of the first `count` images {"image": its number, "true", "predicted": class names, "probability"}.

    labels: whole numbers [n]; probabilities: [n, classes]; probability: 0-1, of the predicted class.
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


def main(argv: list[str]) -> None:
    if argv:
        raise ConfigError(f"unexpected argument {argv[0]!r}; allowed: flags only (--help shows them)")
    if (FLAGS.workdir is None) == (FLAGS.model is None):
        raise ConfigError("allowed: exactly one of --workdir RUN and --model FILE")

    # ---- what to evaluate
    settings: dict[str, Any] = {} if FLAGS.workdir is None else read_run(FLAGS.workdir)
    path = check_model_file(FLAGS.model or RunFolder(FLAGS.workdir).model_file)
    name = FLAGS.dataset or settings.get("dataset", "cifar10")
    data_dir = FLAGS.data_dir or (settings.get("data_dir") if name == settings.get("dataset") else None)
    views = int(FLAGS.views or settings.get("views", 1))

    # ---- the model and images that fit it
    cli.import_tensorflow()
    model = load_model(path)
    size = {"image_size": model.input_shape[1]} if name == "folder" else {}  # the others have one size
    dataset = datasets.load(name, data_dir, **size)
    check_fit(model, dataset)
    trained_on = settings.get("class_names")
    if trained_on is not None and list(dataset.class_names) != list(trained_on):
        raise ConfigError(
            f"data set {name!r} has classes {', '.join(dataset.class_names)}, but the model was trained on"
            f" {', '.join(trained_on)}; choose the data set it was trained on (--dataset, --data_dir)"
        )
    images, labels = select(dataset, FLAGS.split, settings)

    # ---- the numbers
    probabilities = predict_probabilities(model, images, FLAGS.batch_size, views)
    numbers = score(labels, probabilities)
    answers = first_answers(labels, probabilities, dataset.class_names, FLAGS.show)
    if FLAGS.json:
        about = {"model": str(path), "dataset": name, "source": dataset.source, "split": FLAGS.split}
        print(json.dumps({**about, "views": views, **numbers, **({"first": answers} if answers else {})}))
        return
    print(f"{path} on {numbers['n']:,} {FLAGS.split} images of {name} ({dataset.source}), views: {views}")
    print(f"accuracy {numbers['accuracy']:.4f}   loss {numbers['loss']:.4f}\n")
    for a in answers:
        print(f"image {a['image']}: {a['true']}, predicted {a['predicted']} ({a['probability']:.4f})")
    print(
        ("\n" if answers else "")
        + report.classification_report(labels, probabilities.argmax(axis=1), dataset.class_names)
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, USAGE))
