"""Search for a better configuration with KerasTuner: `python -m tuning.search`, or `tune` with your own space.

A space is a function of KerasTuner's `hp`. It draws hyperparameters from `hp` and returns the Config to train. This
script searches such a space over a folder of images (pictures/train/<class>/*), in two processes:

    from functools import partial

    from cifar10_trainer import RECIPES, load_data
    from tuning import tune

    def space(hp):
        return RECIPES["fast.85"].override(
            epochs=10,
            options__dropout=hp.Float("dropout", 0.0, 0.5, step=0.1),
            optimizer__learning_rate=hp.Float("learning_rate", 0.05, 0.5, sampling="log", default=0.12),
        )

    if __name__ == "__main__":
        pictures = partial(load_data, "folder", "pictures", image_size=32)
        result = tune(space, pictures, workdir="searches/pictures", max_trials=10, workers=2)
        print(result.best.accuracy, result.best_config.options)

Run again, the script resumes its search. All results are in the folder `searches/pictures`. The `__main__` guard is
necessary with `workers`, which are processes that import the script.

The modules, from top to bottom; each imports only modules below it:

    search           the command `python -m tuning.search`
    tuner            tune(): a whole search
    chief            the process that hands out trials, and its pool of local workers
    worker           a process that trains trials for a chief
    trial            one trial: hyperparameters -> Config -> training -> metrics
    figure           search.png
    leaderboard      leaderboard.csv, best_config.json, TensorBoard logs and progress lines
    oracle           which hyperparameters to try next, and the state of the search
    search_folder    the names, the lock and the record of the search's folder
    space            the space of the command line
    options          the options of a search

`search`, `chief`, `worker`, `search_folder`, `space` and `options` import TensorFlow inside functions only, because a
process chooses its GPUs before it imports TensorFlow. Importing `tuning` does not import TensorFlow either.
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

    return getattr(tuner, "SearchResult" if name == "Found" else name)  # Found: its name in version 1.0.0
