"""Model files: how a plain Keras model is written and read, as .keras or .h5.

A file is complete, and opens in any Keras from OLDEST_KERAS on, without this package:

- Class names, image size and resize rule are inside it (`ModelInfo`). A .keras file, which is a zip archive, has them under
  KEY in its metadata.json, which Keras writes and never reads; an .h5 file has them as its attribute KEY, in JSON.
- It leaves out the settings of layers that OLDEST_KERAS does not know and that change nothing. A newer Keras writes each
  of its new settings, and an older one refuses all that it does not know.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import archives
from .errors import ConfigError, RunError, check_type, one_line
from .files import parse_json, regular_file
from .keras_state import keras_defaults
from .machine import check_fits

if TYPE_CHECKING:
    import keras

OLDEST_KERAS = "3.4.1"
KEY = "image_classifier"
LONGEST = 10_000_000  # bytes of metadata.json that are read
SUFFIXES = (".keras", ".h5", ".hdf5")
PACKAGED = Path(__file__).parent / "packaged" / "cifar10.keras"
# Keras class -> the arguments of its constructor in OLDEST_KERAS; scripts/model_files.py writes the file.
_ARGUMENTS = Path(__file__).with_name("keras_arguments.json")


@dataclass(frozen=True)
class ModelInfo:
    """What a picture's way through a model needs besides the model.

    Attributes:
        class_names: one for each output of the model; empty: not known.
        resize: how a picture of another shape becomes one of the model's size: "squash" changes its proportions.
        none_above: where the entropy of a picture's probabilities is above this number of nats, the picture looks like none
            of the classes. None: not known.
    """

    class_names: tuple[str, ...] = ()
    resize: str = "squash"
    none_above: float | None = None

    def to_dict(self, model: keras.Model) -> dict[str, Any]:
        """The JSON values that stand in the file of `model`."""
        values = {
            "class_names": list(self.class_names),
            "image_size": list(model.input_shape[1:3]),  # height and width in pixels
            "resize": self.resize,
        }
        return values if self.none_above is None else {**values, "none_above": self.none_above}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], classes: int) -> ModelInfo:
        """The inverse of `to_dict`, for a model of so many classes. Raises ValueError where the values do not fit."""
        names, resize, above = (values.get(key) for key in ("class_names", "resize", "none_above"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"its class names are {str(names)[:80]}")
        if names and (len(names) != classes or len(set(names)) != classes):
            raise ValueError(f"it has {len(names)} class names for {classes} classes")
        if not isinstance(resize, str):
            raise ValueError(f"its resize rule is {str(resize)[:80]}")
        if above is not None and not (isinstance(above, float) and above > 0):
            raise ValueError(f"its none_above is {str(above)[:80]}")
        return cls(tuple(names), resize, above)


def info_of(model: keras.Model) -> ModelInfo:
    """What is known about `model`: its attribute `info`, which `load_model` and training set."""
    info = getattr(model, "info", None)
    return info if isinstance(info, ModelInfo) else ModelInfo()


# ---- reading


@keras_defaults()
def load_model(path: str | Path | None = None) -> keras.Model:
    """Opens a saved image classifier, uncompiled, with Keras's safe mode on.

    Args:
        path: a .keras or .h5 file; None: the CIFAR-10 network in this package, for uint8 images of 32x32 pixels.

    Returns:
        a model that maps [batch, height, width, 3], with a fixed height and width, to [batch, classes]. Its attribute `info`
        is what the file says about it, a `ModelInfo`.
    Raises:
        ConfigError: if there is no such file, or the model has other shapes.
        RunError: if the file does not open as a model.
    """
    path = PACKAGED if path is None else path
    check_type("path", path, (str, os.PathLike), "a .keras or .h5 file, or None")
    path = check_model_file(path)
    import keras

    try:
        stored = _stored_bytes(path)

        def check(size: int) -> None:  # the file may describe layers whose weights it does not hold
            if size > archives.RATIO * stored + archives.SLACK:
                raise ValueError(f"it describes a model of {size:,} bytes or more, and holds {stored:,}")

        with bounded_weights(check):
            model = keras.models.load_model(path, compile=False)
    except RunError:
        raise
    except Exception as error:
        # Each of Keras's readers raises errors of its own.
        raise _does_not_open(path, error) from error
    input_shape: Any = getattr(model, "input_shape", None)
    output_shape: Any = getattr(model, "output_shape", None)
    if not maps_images_to_classes(input_shape, output_shape):
        raise ConfigError(
            f"the model in {path} maps {input_shape} to {output_shape};"
            " allowed: one that maps (batch, height, width, 3), with a fixed height and width, to (batch, classes), with two"
            " classes or more"
        )
    try:
        values = _read_values(path)
        model.info = ModelInfo() if values is None else ModelInfo.from_dict(values, output_shape[1])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _does_not_open(path, error) from error
    return model


def check_model_file(path: str | Path) -> Path:
    """`path`, if its name and a file there fit a saved model. Imports no TensorFlow. Raises ConfigError."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; allowed: a .keras or .h5 file, such as {path}/model.keras")
    if not path.is_file():
        raise ConfigError(f"no model file at {path}; allowed: a .keras or .h5 file, such as RUN/model.keras")
    if path.suffix not in SUFFIXES:  # Keras does not know them in capitals
        raise ConfigError(f"the model file is {path}; allowed: a name that ends in .keras, .h5 or .hdf5")
    return path


def _stored_bytes(path: Path) -> int:
    """The bytes of the weights in a model file. Raises ValueError where it holds less than it claims, OSError, RunError."""
    import h5py

    path = regular_file(path)
    size = path.stat().st_size
    check_fits(size, f"the model in {path}", "use a machine with more memory")
    if path.suffix != ".keras":
        with h5py.File(path) as file:
            return archives.check_hdf5(file, size)
    if not zipfile.is_zipfile(path):
        raise ValueError("it is damaged, or not a .keras file, which is a zip archive")
    archives.check_zip(path)
    stored = 0
    with zipfile.ZipFile(path) as archive:
        if "config.json" not in archive.namelist():
            raise ValueError("it has no config.json, so it is not a model")
        for member in archive.infolist():
            if member.filename.endswith(".h5"):
                with archive.open(member) as part, h5py.File(part) as file:
                    stored += archives.check_hdf5(file, member.file_size)
    return stored


@contextlib.contextmanager
def bounded_weights(check: Callable[[int], None]) -> Iterator[None]:
    """Calls `check` with the bytes of all variables so far, before each one that Keras makes in the block is allocated.

    Args:
        check: raises an error where they are too many.
    """
    import tensorflow as tf

    total = 0

    def create(make: Callable[..., Any], **options: Any) -> Any:
        nonlocal total
        value = options.get("initial_value")
        if callable(value):
            with tf.Graph().as_default():  # gives the shape, and computes nothing
                value = value()
        if isinstance(value, tf.Tensor):
            total += math.prod(value.shape) * value.dtype.size
            check(total)
        return make(**options)

    with tf.variable_creator_scope(create):
        yield


def maps_images_to_classes(input_shape: Any, output_shape: Any, fixed: bool = True) -> bool:
    """Whether a model of these input and output shapes takes images [batch, height, width, 3] to two classes or more.

    fixed: whether height and width must be known.
    """
    takes_images = is_shape(input_shape, 4, fixed) and input_shape[3] == 3
    return takes_images and is_shape(output_shape, 2) and output_shape[1] > 1


def is_shape(shape: Any, rank: int, fixed: bool = True) -> bool:
    """Whether it is one shape of this rank, and not those of several inputs. fixed: whether all but the batch must be known."""
    allowed = int if fixed else (int, type(None))
    return isinstance(shape, tuple) and len(shape) == rank and all(isinstance(n, allowed) for n in shape[1:])


def _does_not_open(path: Path, error: Exception) -> RunError:
    if unknown := re.search(r"(?:Could not locate class|Unknown layer:) '([^']+)'", str(error)):
        return RunError(
            f"{path} needs the class {unknown[1]!r}, which is not known here; in Python, import the module that registers it, then"
            " call load_model"
        )
    return RunError(
        f"{path} does not open as a Keras model ({one_line(error)}); name another file, or train it again"
    )


def _read_values(path: Path) -> dict[str, Any] | None:
    """What a file holds under KEY; None where it holds nothing, as one that Keras alone has written."""
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive, archive.open("metadata.json") as file:
            return parse_json(file.read(LONGEST)).get(KEY)
    import h5py

    with h5py.File(path) as file:
        return parse_json(file.attrs[KEY]) if KEY in file.attrs else None


# ---- writing


def write_model(model: keras.Model, path: Path) -> None:
    """Writes a plain Keras model and its `info`, in the format that the name of `path` ends in.

    The caller writes to a temporary name and renames: see `files.replacing`.

    Raises:
        OSError: if it cannot be written.
    """
    with _without_absls_warnings():  # Keras's on the older format, which somebody asked for
        model.save(path)
    values = info_of(model).to_dict(model)
    if path.suffix == ".keras":
        with archives.rewriting(path) as members:
            metadata = {**json.loads(members["metadata.json"]), KEY: values}
            members["metadata.json"] = json.dumps(metadata).encode()
            members["config.json"] = json.dumps(portable(json.loads(members["config.json"]))).encode()
        return
    import h5py

    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = json.dumps(portable(json.loads(file.attrs["model_config"])))
        file.attrs[KEY] = json.dumps(values)


@contextlib.contextmanager
def _without_absls_warnings() -> Iterator[None]:
    from absl import logging as absl_logging

    logger = absl_logging.get_absl_logger()
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def portable(config: Any) -> Any:
    """A model's configuration without the settings that OLDEST_KERAS does not know and that change nothing.

    A setting changes nothing where the layer, or other Keras object, made without it has the same one. What OLDEST_KERAS
    knows stays, so that a default that differs between versions is never relied on.

    Args:
        config: JSON values, as in config.json of a .keras file or model_config of an .h5 file.

    Returns:
        JSON values of the same structure.
    """
    if isinstance(config, list):
        return [portable(value) for value in config]
    if not isinstance(config, dict):
        return config
    idle = _idle_settings(config)
    result = {key: portable(value) for key, value in config.items()}
    if idle:
        result["config"] = {key: value for key, value in result["config"].items() if key not in idle}
    return result


def _idle_settings(entry: dict[str, Any]) -> set[str]:
    """The keys of a Keras object's "config" that OLDEST_KERAS does not know and that change nothing."""
    settings, name = entry.get("config"), entry.get("class_name")
    module = entry.get("module") or "keras.layers"  # the layers in .h5 files have no module
    known = _known_arguments().get(f"{module}.{name}")
    if known is None or not isinstance(settings, dict) or set(settings) <= set(known):
        return set()
    kind = getattr(importlib.import_module(module), str(name))
    # As JSON: from_config may change what it is given, and get_config returns tuples.
    without = kind.from_config(json.loads(json.dumps({k: v for k, v in settings.items() if k in known})))
    found = json.loads(json.dumps(without.get_config(), default=str))
    new = set(settings) - set(known)
    # The name of an operation, which older versions choose themselves, changes nothing either.
    return {key for key in new if key == "name" or (key in found and found[key] == settings[key])}


@functools.cache
def _known_arguments() -> dict[str, list[str]]:
    return json.loads(_ARGUMENTS.read_text(encoding="utf-8"))["arguments"]
