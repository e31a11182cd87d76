"""Image files -> labels and probabilities (python -m cifar10_trainer.predict).

    python -m cifar10_trainer.predict cat.jpg                                   (the CIFAR-10 network in this package)
    python -m cifar10_trainer.predict --model RUN/model.keras cat.jpg holiday/
    python -m cifar10_trainer.predict --model RUN/model.keras --json cat.jpg

Images of any size and common format are resized to the model's input; the model does all other preprocessing.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from . import cli, datasets
from .config import RESIZES
from .datasets.arrays import check_images
from .datasets.folder import find_pictures
from .datasets.images import SUFFIXES, open_formats, readable, without_warnings
from .errors import ConfigError, RunError, check_type, reason_of, unknown
from .keras_state import keras_defaults
from .machine import cpu_count
from .model_file import PACKAGED, ModelInfo, check_model_file, info_of, load_model
from .run_folder import RunFolder, existing
from .scoring import check_model, predict_probabilities, takes

if TYPE_CHECKING:
    import keras

# of what is labelled at a time: bytes of pixels, probabilities, and pictures, so that the first lines come soon
BLOCK_BYTES, BLOCK_PROBABILITIES, BLOCK_PICTURES = 2**28, 2**20, 4000

FLAGS = flags.FlagValues()
cli.define_common(FLAGS)
_define = cli.definer(FLAGS, "python -m cifar10_trainer.predict")

_define(flags.DEFINE_string, "workdir", "a run folder, whose model is used")
_define(
    flags.DEFINE_string,
    "model",
    "a .keras or .h5 file, or a run folder, instead of --workdir; default: the CIFAR-10 network in this package",
)
_define(
    flags.DEFINE_list,
    "class_names",
    "names of the classes, in order; default: those in the model file, else in its run folder, else numbers",
)
_define(
    flags.DEFINE_enum, "resize", "how images are resized; default: as for training, else squash",
    enum_values=RESIZES,
)  # fmt: skip
_define(flags.DEFINE_integer, "top_k", "how many labels to show for each image", 3, lower_bound=1)
_define(
    flags.DEFINE_boolean,
    "json",
    "print one JSON object a line, with all labels unless --top_k is given",
    False,
)

USAGE = """usage: python -m cifar10_trainer.predict [--workdir=RUN | --model=FILE] IMAGE... [flags]

Labels image files; a folder stands for the images in it and in its folders. Files that cannot be read are named on
stderr, and the exit status is then 1.
Examples:
  python -m cifar10_trainer.predict cat.jpg
  python -m cifar10_trainer.predict --workdir=runs/mine cat.jpg holiday/
  python -m cifar10_trainer.predict --model=model.keras --json cat.jpg"""


def find_images(arguments: Sequence[str]) -> list[Path]:
    """The image files: each argument or, where it is a folder, the images in it and in the folders within it, sorted.

    Raises ConfigError where an argument does not exist, and where a folder holds no images.
    """
    paths: list[Path] = []
    if "" in arguments:  # as from an unset variable of the shell
        raise ConfigError("an IMAGE is empty; allowed: image files and folders of them")
    for argument in map(Path, arguments):
        if argument.is_dir():
            try:
                inside = [Path(path) for path in find_pictures(argument, may_hold_run=True)]
            except OSError as error:
                place = readable(error.filename or argument)
                raise RunError(f"cannot read {place}: {reason_of(error)}; correct that") from error
            if not inside:
                raise ConfigError(
                    f"no images in {argument}; allowed: files that end in {', '.join(SUFFIXES)}"
                )
            paths += inside
        elif argument.exists() or argument.is_symlink():
            paths.append(argument)
        else:
            raise ConfigError(f"no image at {argument}; allowed: image files and folders of them")
    return paths


def info_beside(model_path: str | Path) -> ModelInfo:
    """What the config.json of a run beside a model says about it, whose own file may say nothing, as those of version 1.0.0."""
    config: dict[str, Any] = {}
    with contextlib.suppress(RunError):  # there is none, or it is another program's
        config = RunFolder(Path(model_path).parent).read_config()
    names, resize = config.get("class_names"), config.get("resize")
    if "recipe" not in config or not isinstance(names, list):
        return ModelInfo()
    return ModelInfo(tuple(map(str, names)), resize if resize in RESIZES else "squash")


@keras_defaults()
def predict_images(
    model: keras.Model,
    images: Sequence[str | Path] | str | Path | np.ndarray,
    class_names: Sequence[str] | None = None,
    resize: str | None = None,
) -> list[dict[str, Any]]:
    """Labels images. Files are all read before the first is predicted.

    Args:
        model: as from `load_model`.
        images: image files, one image file, or raw pixels uint8 [n, height, width, 3] in the model's size, or grey ones
            [n, height, width].
        class_names: one for each output of the model; None: those in the model's file, else numbers from 0.
        resize: how files are resized, "squash", "crop" or "pad", see `datasets.read_image`; None: as for training.

    Returns:
        for each image {"file": its name, or its number from 0, "label", "probability", "probabilities": {class name:
        0-1}}, the most probable class first. Where the model knows when a picture looks like none of its classes (that in
        this package does), also {"none_of_the_classes": whether this one does}.
    Raises:
        RunError: if a file is not an image.
        ConfigError: if the class names do not fit the model.
    """
    check_model(model)
    height, width, _ = model.input_shape[1:]
    names = _check_class_names(model, class_names)
    if resize is not None and resize not in RESIZES:
        raise unknown("resize", resize, RESIZES)
    resize = resize or info_of(model).resize
    if not isinstance(images, str | Path | np.ndarray):
        images = list(images) if isinstance(images, Iterable) else [images]
        for image in images:
            check_type("an image", image, (str, Path), "files, or one array uint8 [n, height, width, 3]")
    if isinstance(images, np.ndarray):
        pixels, files = check_images("images", images), [str(i) for i in range(len(images))]
        if not takes(model, pixels.shape[1:]):
            raise ConfigError(f"images has shape {images.shape}; allowed: {('n', height, width, 3)}")
    elif None in (height, width):
        raise ConfigError(
            "images are files, but the model takes images of any size; allowed: an array of images"
        )
    else:
        files = [str(path) for path in ([images] if isinstance(images, str | Path) else images)]
        pixels = np.zeros((len(files), height, width, 3), np.uint8)
        for image, path in zip(pixels, files, strict=True):
            image[:] = datasets.read_image(path, (height, width), resize)
    return _label(model, pixels, files, names)


def _check_class_names(model: keras.Model, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """The class names; for None those of the model's file, else numbers. Raises ConfigError where they do not fit."""
    classes = model.output_shape[-1]
    names = info_of(model).class_names or tuple(map(str, range(classes)))
    if class_names is not None:
        check_type("class_names", class_names, (list, tuple, np.ndarray), "a list of names")
        names = tuple(map(str, class_names))
    if len(names) != classes or len(set(names)) != classes:
        raise ConfigError(
            f"{len(names)} class names ({', '.join(names)}) for a model of {classes} classes;"
            f" allowed: {classes} different ones (--class_names=a,b,...)"
        )
    return names


def _label(
    model: keras.Model, pixels: np.ndarray, files: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """What `predict_images` returns, of pixels in the model's size."""
    results: list[dict[str, Any]] = []
    info = info_of(model)
    for file, row in zip(files, predict_probabilities(model, pixels), strict=True):
        ranked = [(names[c], float(f"{row[c]:.6g}")) for c in np.argsort(-row, kind="stable")]
        label, probability = ranked[0]
        results.append(
            {"file": file, "label": label, "probability": probability, "probabilities": dict(ranked)}
        )
        if info.none_above is not None:
            results[-1]["none_of_the_classes"] = entropy(row) > info.none_above
    return results


def entropy(probabilities: np.ndarray) -> float:
    """The entropy in nats of probabilities [classes]: 0 where one class has all, log(classes) where all have the same."""
    p = np.asarray(probabilities, np.float64)
    return float(-np.sum(p * np.log(np.maximum(p, 1e-30))))


def label_files(
    model: keras.Model, paths: Sequence[Path], names: Sequence[str], resize: str
) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Labels the files that can be read, some at a time, so that memory does not grow with their number.

    Args:
        model: as from `load_model`.
        paths: any number of image files.
        names: one for each output of the model.
        resize: see `predict_images`.

    Yields:
        for each block of files: results as those of `predict_images`, and an error for each file that cannot be read.
    """
    height, width, _ = model.input_shape[1:]
    fit = BLOCK_BYTES // (height * width * 3), BLOCK_PROBABILITIES // len(names)
    count = max(1, min(*fit, BLOCK_PICTURES))
    _check_class_names(model, names)

    def read(path: Path) -> np.ndarray | str:
        try:
            return datasets.read_image(path, (height, width), resize)
        except RunError as error:
            return str(error)

    open_formats()  # not in several threads at once
    with without_warnings(), ThreadPoolExecutor(cpu_count()) as pool:
        for start in range(0, len(paths), count):
            block = paths[start : start + count]
            read_ones = list(zip(block, pool.map(read, block), strict=True))
            good = [(str(path), image) for path, image in read_ones if not isinstance(image, str)]
            results = []
            if good:
                results = _label(model, np.stack([i for _, i in good]), [f for f, _ in good], names)
            yield results, [image for _, image in read_ones if isinstance(image, str)]


def table(results: Sequence[dict[str, Any]], top_k: int) -> str:
    """`results` as aligned text: file, label, probability, then further labels, `top_k` in all, and a note."""
    rows = [("file", "label", "probability", "then" if top_k > 1 else "", "")]
    for result in results:
        following = list(result["probabilities"].items())[1:top_k]
        then = ", ".join(f"{name} {p:.4f}" for name, p in following)
        note = "looks like none of the classes" if result.get("none_of_the_classes") else ""
        rows.append((readable(result["file"]), result["label"], f"{result['probability']:.4f}", then, note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str]) -> None:
    if FLAGS.workdir is not None and FLAGS.model is not None:
        raise ConfigError(
            "--workdir and --model; allowed: one of the two, or neither for the network in this package"
        )
    if not argv:
        raise ConfigError("no IMAGE; allowed: image files and folders of them")
    folder = FLAGS.workdir or FLAGS.model or PACKAGED
    file = existing(folder).model_file if FLAGS.workdir or Path(folder).is_dir() else folder
    path, paths = check_model_file(file), find_images(argv)
    cli.import_tensorflow()
    model = load_model(path)
    info = info_of(model)
    if not info.class_names:
        info = info_beside(path)
    names = FLAGS.class_names or info.class_names or tuple(map(str, range(model.output_shape[-1])))
    resize = FLAGS.resize or info.resize
    results: list[dict[str, Any]] = []
    unreadable = 0
    for block, errors in label_files(model, paths, names, resize):
        for error in errors:
            print(error, file=sys.stderr)
        unreadable += len(errors)
        for result in block:
            if not FLAGS.json or FLAGS["top_k"].present:
                ranked = list(result["probabilities"].items())
                result["probabilities"] = dict(ranked[: FLAGS.top_k])
            if FLAGS.json:
                print(json.dumps(result))
            else:
                results.append(result)  # the widths of the table depend on all of them
    if results:
        print(table(results, FLAGS.top_k))
    if unreadable:
        raise RunError(f"{unreadable:,} of {len(paths):,} images cannot be read; repair or remove them")


def command() -> int:
    return cli.run(main, FLAGS, USAGE)


if __name__ == "__main__":
    sys.exit(command())
