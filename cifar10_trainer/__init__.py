"""Train image classifiers on CIFAR-10 with TensorFlow and Keras, fast.

    from cifar10_trainer import RECIPES, build_model, train

    model = build_model(filters=(32, 128, 128))         # a plain, uncompiled Keras model on raw uint8 images
    metrics = train(RECIPES["fast.default"].override(epochs=4), "runs/mine")

Nothing here imports TensorFlow until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "1.0.0"  # before the imports, since some of them read it

from .config import Config
from .errors import ConfigError, RunError
from .recipes import DEFAULT_RECIPE, RECIPES

if TYPE_CHECKING:
    from .cross_validation import cross_validate as cross_validate
    from .datasets import load as load
    from .models.fast import build as build_model
    from .training import train_and_evaluate as train

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "Config",
    "ConfigError",
    "RunError",
    "build_model",
    "cross_validate",
    "load",
    "train",
]

_LATE = {
    "build_model": ("models.fast", "build"),
    "cross_validate": ("cross_validation", "cross_validate"),
    "load": ("datasets", "load"),
    "train": ("training", "train_and_evaluate"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _LATE[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    # Importing the submodule `train` has just set that name to the module: the function is what it stands for.
    globals()[name] = value
    return value
