"""Train image classifiers on CIFAR-10 with TensorFlow and Keras, fast.

    from cifar10_trainer import RECIPES, build_model, train

    model = build_model(filters=(32, 128, 128))         # an ordinary, uncompiled Keras model on raw uint8 images
    metrics = train(RECIPES["fast.default"].override(epochs=4), "runs/mine")

Every name in `__all__` can be imported from here. TensorFlow is imported when the first name that needs it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "1.1.0.dev0"  # before the imports, since some of them read it

from . import machine
from .config import Augmentation, Averaging, Config, Optimizer, Origin, Schedule
from .errors import ConfigError, FolderBusyError, RunError, RunInterrupted
from .recipes import DEFAULT_RECIPE, RECIPES

machine.use_onednn()  # TensorFlow reads the setting when it is imported

if TYPE_CHECKING:
    from .accelerate import make_training_model as make_training_model
    from .augment import RandomColorJitter as RandomColorJitter
    from .augment import RandomCutout as RandomCutout
    from .augment import RandomFlip as RandomFlip
    from .augment import RandomRotation as RandomRotation
    from .augment import RandomShift as RandomShift
    from .augment import RandomZoom as RandomZoom
    from .cross_validation import cross_validate as cross_validate
    from .datasets import Dataset as Dataset
    from .datasets import load as load
    from .datasets import load as load_data
    from .engine import Engine as Engine
    from .evaluate import evaluate_model as evaluate_model
    from .model_file import load_model as load_model
    from .models import build_model as build_model
    from .optim import Muon as Muon
    from .optim import RunSchedule as RunSchedule
    from .pipeline import make_dataset as make_dataset
    from .predict import predict_images as predict_images
    from .training import train_and_evaluate as train

# Name -> the module, and its name there. They are imported at first use, because most of them import TensorFlow.
_LAZY = {
    "Dataset": ("datasets", "Dataset"),
    "Engine": ("engine", "Engine"),
    "Muon": ("optim", "Muon"),
    "RandomColorJitter": ("augment", "RandomColorJitter"),
    "RandomCutout": ("augment", "RandomCutout"),
    "RandomFlip": ("augment", "RandomFlip"),
    "RandomRotation": ("augment", "RandomRotation"),
    "RandomShift": ("augment", "RandomShift"),
    "RandomZoom": ("augment", "RandomZoom"),
    "RunSchedule": ("optim", "RunSchedule"),
    "build_model": ("models", "build_model"),
    "cross_validate": ("cross_validation", "cross_validate"),
    "evaluate_model": ("evaluate", "evaluate_model"),
    "load": ("datasets", "load"),  # the name of load_data in version 1.0.0
    "load_data": ("datasets", "load"),
    "load_model": ("model_file", "load_model"),
    "make_dataset": ("pipeline", "make_dataset"),
    "make_training_model": ("accelerate", "make_training_model"),
    "predict_images": ("predict", "predict_images"),
    "train": ("training", "train_and_evaluate"),
}

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "Augmentation",
    "Averaging",
    "Config",
    "ConfigError",
    "Dataset",
    "Engine",
    "FolderBusyError",
    "Muon",
    "Optimizer",
    "Origin",
    "RandomColorJitter",
    "RandomCutout",
    "RandomFlip",
    "RandomRotation",
    "RandomShift",
    "RandomZoom",
    "RunError",
    "RunInterrupted",
    "RunSchedule",
    "Schedule",
    "build_model",
    "cross_validate",
    "evaluate_model",
    "load",
    "load_data",
    "load_model",
    "make_dataset",
    "make_training_model",
    "predict_images",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from .keras_state import check_backend

    module, attribute = _LAZY[name]
    if module != "datasets":  # which needs no Keras
        check_backend()
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
