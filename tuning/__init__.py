"""Search for a better configuration with KerasTuner: `python -m tuning.search`, or a space of one's own.

A space is a function that draws hyperparameters from KerasTuner's `hp` and gives the Config to train. This searches
one over a folder of images (pictures/train/<class>/*), on two processes:

    from functools import partial

    from cifar10_trainer import RECIPES, load
    from tuning import tune

    def space(hp):
        return RECIPES["fast.85"].override(
            epochs=10,
            options__dropout=hp.Float("dropout", 0.0, 0.5, step=0.1),
            optimizer__learning_rate=hp.Float("learning_rate", 0.05, 0.5, sampling="log", default=0.12),
        )

    if __name__ == "__main__":
        pictures = partial(load, "folder", "pictures", image_size=32)
        result = tune(space, pictures, workdir="searches/pictures", max_trials=10, workers=2)
        print(result.best.accuracy, result.best_config.options)

Run again, it goes on where it was; what it has found is in the folder `searches/pictures`. The `__main__` guard is
for `workers`, which are processes that import the script. Nothing here imports TensorFlow until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import DEFAULT_TUNER, OBJECTIVES, TUNERS, Options
from .space import SPACE, Space

if TYPE_CHECKING:
    from .tuner import SearchResult as Found
    from .tuner import SearchResult as SearchResult
    from .tuner import tune as tune

__all__ = [
    "DEFAULT_TUNER",
    "OBJECTIVES",
    "SPACE",
    "TUNERS",
    "Found",
    "Options",
    "SearchResult",
    "Space",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in ("Found", "SearchResult", "tune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import tuner

    return getattr(tuner, "SearchResult" if name == "Found" else name)  # its name in version 1.0.0
