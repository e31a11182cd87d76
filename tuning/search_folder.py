"""The search's folder: the names of its files, its lock, and the record of what is searched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cifar10_trainer.config import PRECISIONS
from cifar10_trainer.errors import ConfigError, RunError, shown
from cifar10_trainer.files import (
    LockedFolder,
    cannot_write,
    folder_lock,
    read_json,
    remove_files,
    remove_leftovers,
    write_json,
)
from cifar10_trainer.run_folder import SEARCH_FILE, check_kind

# What a search writes, and --overwrite removes in this order. search.json shows whose the others are, so it goes last.
SEARCH_FILES = ("trials", "best_config.json", "leaderboard.csv", "search.png", "tensorboard", SEARCH_FILE)


class SearchFolder(LockedFolder):
    """The folder of one search.

    A search first writes search.json, which records what it searches. Each trial is a run folder in trials/, and the
    state of the oracle is a file beside them. The search updates its other files after each trial.

    Args:
        path: the folder. It need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self.search_file = self.path / SEARCH_FILE
        self.trials = self.path / "trials"
        self.state_file = self.trials / "search_state.json"
        self.precision_file = self.trials / "precision.json"
        self.leaderboard_file = self.path / "leaderboard.csv"
        self.best_config_file = self.path / "best_config.json"
        self.figure_file = self.path / "search.png"
        self.tensorboard = self.path / "tensorboard"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder, and locks it against other processes. Removes it again if it was made and left empty.

        Removes the temporary files that killed searches left.

        Raises:
            FolderBusyError: if another process searches in the folder.
            ConfigError: if it holds a run or a cross-validation.
            RunError: if the folder cannot be made.
        """
        with self._locked(f"another process is searching in {self}; choose another --workdir"):
            check_kind(self.path, "search")
            yield

    def _tidy(self) -> None:
        remove_leftovers(self.path, SEARCH_FILES)
        remove_leftovers(self.trials, [self.state_file.name, self.precision_file.name])

    def begin(self, record: Mapping[str, Any], overwrite: bool) -> None:
        """Writes `record` to search.json, unless the folder holds another search.

        Args:
            record: what is searched, as JSON values. A resumed search must have the same record.
            overwrite: whether to remove the search that is in the folder first.

        Raises:
            ConfigError: if the folder holds a search with another record, or files of a search's names and no search.
            RunError: if search.json is damaged or cannot be written, or if it is missing beside a state.
        """
        if overwrite:
            remove_files(self.path, self.search_file.name, SEARCH_FILES[:-1])
        if self.search_file.exists():
            for key, was, now in _differences(read_json(self.search_file), record):
                what = f"{key} was {shown(was)}, now {shown(now)}"
                if key == "images":  # a fingerprint
                    what = "images have been added, removed or changed since it began"
                raise ConfigError(
                    f"{self} holds another search: {what};"
                    " choose another --workdir, or replace it with --overwrite"
                )
        elif self.state_file.exists():
            raise RunError(
                f"{self.state_file} has no {self.search_file} beside it, so it is not resumed; choose another --workdir,"
                f" or delete {self.trials}"
            )
        elif found := [name for name in SEARCH_FILES if _holds_something(self.path / name)]:
            raise ConfigError(
                f"{self} holds {', '.join(found)}, but no search, which has a {self.search_file.name}; choose another --workdir,"
                " or move them away"
            )
        write_json(self.search_file, record, durable=True, parents=False)

    def precision(self, choose: Callable[[], str]) -> str:
        """The dtype policy that the precision "auto" means in this search: the choice of the process that asks first.

        Args:
            choose: returns a policy. It is called where none is recorded; other processes wait meanwhile.

        Raises:
            RunError: if it cannot be recorded.
        """
        try:
            with folder_lock(self.trials, lambda: None):
                with contextlib.suppress(RunError):
                    policy = read_json(self.precision_file).get("auto")
                    if policy in PRECISIONS and policy != "auto":
                        return str(policy)
                policy = choose()
                write_json(self.precision_file, {"auto": policy}, durable=True)
                return policy
        except OSError as error:
            raise cannot_write(self.trials, error) from error


def _holds_something(path: Path) -> bool:
    """Whether a path is more than an empty folder, as a worker makes one that is started before its chief."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def trial_folder(trial_id: str) -> str:
    """The folder of a trial, relative to the search's folder. KerasTuner determines its name."""
    return f"trials/trial_{trial_id}"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of each difference, also within sections; None for a missing value."""
    for key in dict.fromkeys([*a, *b]):
        was, now = a.get(key), b.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from ((f"{key}.{inner}", a, b) for inner, a, b in _differences(was, now))
        elif was != now:
            yield key, was, now
