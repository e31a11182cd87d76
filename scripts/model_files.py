"""Checks that model files open without this package, in another Keras, and know their classes; .ci/run calls it.

    python scripts/model_files.py write FOLDER       # with this package: models, and what they answer
    python scripts/model_files.py read FOLDER        # with Keras alone, of any version and backend
    python scripts/model_files.py arguments          # with the oldest Keras: is cifar10_trainer/keras_arguments.json right?
    python scripts/model_files.py arguments --write  # the same, and writes it

`read` and `arguments` import Keras and what it needs, and nothing of this project.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

ARGUMENTS = Path(__file__).parents[1] / "cifar10_trainer" / "keras_arguments.json"
NAMES = ("apple", "lemon", "plum")
TOLERANCE = 2e-6  # of a probability, between two backends


def write(folder: Path) -> None:
    """A small model of each architecture, in both formats, with probabilities for the same four images."""
    from cifar10_trainer import build_model, model_file

    options: dict[str, dict[str, Any]] = {
        "fast": {"filters": (8, 8), "dropout": 0.1},
        "practical": {"filters": (4, 8), "dense": (8,)},
        "vgg": {"filters": (4,), "dropout": 0.2, "l2": 0.001, "batch_norm": True},
        "course": {},
        "leaky": {"blocks": ((4,), (8,)), "dropout": 0.1},
        "wide_head": {},
        "transfer": {"backbone": "mobilenetv2", "weights": None, "dense": (), "image_size": 64},
    }
    models = {name: build_model(name, num_classes=len(NAMES), **chosen) for name, chosen in options.items()}
    models["own"] = own_model()
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    np.save(folder / "images.npy", images)
    if model_file.PACKAGED.exists():
        models["packaged"] = model_file.load_model()
    for name, model in models.items():
        # The packaged file as it is; and Keras writes no operations, as in x + y, to .h5.
        suffixes = {"packaged": (), "own": (".keras",)}.get(name, (".keras", ".h5"))
        if name == "packaged":
            shutil.copy(model_file.PACKAGED, folder / "packaged.keras")
        else:
            model.info = model_file.ModelInfo(NAMES)
        for suffix in suffixes:
            model_file.write_model(model, folder / f"{name}{suffix}")
        np.save(folder / f"{name}.npy", model.predict(images, verbose=0))
        (folder / f"{name}.json").write_text(json.dumps(model.info.to_dict(model)), encoding="utf-8")


def own_model() -> Any:
    """A user's own model, of layers and operations that the architectures here do not have."""
    import keras
    from keras import layers

    images = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 255)(images)
    x = layers.RandomFlip("horizontal")(x)
    x = layers.SeparableConv2D(8, 3, depthwise_constraint=keras.constraints.MaxNorm(3.0))(x)
    x = layers.GroupNormalization(4)(x)
    x = layers.PReLU(shared_axes=[1, 2])(x)
    x = layers.DepthwiseConv2D(3, depthwise_initializer="he_normal", depthwise_regularizer="l2")(x)
    x = layers.SpatialDropout2D(0.1)(x)
    x = layers.Add()([x, layers.Conv2D(8, 1, kernel_initializer="orthogonal")(x)])
    x = layers.Reshape((-1, 8))(layers.AveragePooling2D(4)(x))
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    x = keras.ops.mean(x, axis=1)
    x = keras.Sequential([layers.Dense(8, activation="gelu"), layers.UnitNormalization()])(x)
    return keras.Model(images, layers.Dense(len(NAMES), activation="softmax")(x))


def read(folder: Path) -> None:
    """Opens each file under another name. Exits where one does not open, answers otherwise, or lacks its class names."""
    import h5py
    import keras

    files = sorted(path for path in folder.glob("*") if path.suffix in (".keras", ".h5"))
    if not files or not (folder / "images.npy").exists():
        sys.exit(
            f"{folder} holds no model files with their images.npy; allowed: a folder that `write` has filled"
        )
    images = np.load(folder / "images.npy")
    differences = []
    for file in files:
        with tempfile.TemporaryDirectory() as other:
            path = Path(shutil.copy(file, Path(other, f"a copy of {file.name}")))
            model = keras.models.load_model(path, compile=False)
        found = np.asarray(model(images, training=False))
        differences.append(np.abs(found - np.load(file.with_suffix(".npy"))).max())
        if file.suffix == ".keras":
            about = json.loads(zipfile.ZipFile(file).read("metadata.json"))["image_classifier"]
        else:
            with h5py.File(file) as opened:
                about = json.loads(opened.attrs["image_classifier"])
        assert about == json.loads(file.with_suffix(".json").read_text(encoding="utf-8")), about
    worst = np.max(differences)
    assert worst < TOLERANCE, f"probabilities differ by {worst:.1e}"
    print(
        f"Keras {keras.__version__} on {keras.backend.backend()}: {len(files)} files, equal within {worst:.1e}"
    )


def constructor_arguments() -> dict[str, list[str]]:
    """Class of this Keras -> the names that its constructor takes, those of its base classes included."""
    import keras

    public = (keras, keras.layers, keras.initializers, keras.regularizers, keras.constraints)
    kinds = {
        f"{module.__name__.replace('keras.api', 'keras')}.{kind.__name__}": kind
        for module in public
        for kind in vars(module).values()
        if inspect.isclass(kind) and hasattr(kind, "get_config")
    }
    for name, module in sys.modules.copy().items():  # operations, as x / 255 makes one, have no public names
        if name.startswith("keras.src.ops."):
            for kind in vars(module).values():
                if inspect.isclass(kind) and issubclass(kind, keras.Operation) and kind.__module__ == name:
                    kinds[f"{name}.{kind.__name__}"] = kind
    return {name: sorted(_names(kinds[name])) for name in sorted(kinds)}


def _names(kind: type) -> set[str]:
    """The names of the arguments of a constructor; where it takes any others, also those of the next base class."""
    found: set[str] = set()
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found - {"self"}


def arguments(overwrite: bool) -> None:
    """Compares keras_arguments.json with this Keras, after it was written where `overwrite` is set."""
    import keras

    found = {"keras": keras.__version__, "arguments": constructor_arguments()}
    if overwrite:
        rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found["arguments"].items())
        ARGUMENTS.write_text(
            f'{{\n "keras": "{keras.__version__}",\n "arguments": {{\n{rows}\n }}\n}}\n', encoding="utf-8"
        )
    assert json.loads(ARGUMENTS.read_text(encoding="utf-8")) == found, f"{ARGUMENTS} is of another Keras"
    print(f"{ARGUMENTS.name}: {len(found['arguments'])} classes of Keras {keras.__version__}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", folder]:
            write(Path(folder))
        case ["read", folder] if Path(folder).is_dir():
            read(Path(folder))
        case ["arguments"]:
            arguments(overwrite=False)
        case ["arguments", "--write"]:
            arguments(overwrite=True)
        case _:
            sys.exit(__doc__)
