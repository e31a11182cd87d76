"""The search's folder: the names, the lock and the record of its files. No other module knows what it holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cifar10_trainer.errors import ConfigError, FolderBusyError
from cifar10_trainer.files import cannot_write, folder_lock, read_json, remove_files, write_json

# What a search writes, and --overwrite removes.
SEARCH_FILES = ("trials", "tensorboard", "search.json", "leaderboard.csv", "best_config.json", "search.png")


class SearchFolder:
    """The folder of one search.

    A search writes search.json first, which says what is searched. Its trials are run folders in trials/, beside the
    file with the state of the oracle. The rest is written again whenever a trial ends.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.search_file = self.path / "search.json"
        self.trials = self.path / "trials"
        self.state_file = self.trials / "search_state.json"
        self.leaderboard_file = self.path / "leaderboard.csv"
        self.best_config_file = self.path / "best_config.json"
        self.figure_file = self.path / "search.png"
        self.tensorboard = self.path / "tensorboard"

    def __str__(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder, and keeps other searches out of it. A folder that was made and left empty is removed again.

        Raises FolderBusyError where another process searches in it, RunError where it cannot be made.
        """

        def busy() -> None:
            raise FolderBusyError(f"another process is searching in {self}; choose another --workdir")

        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(self.path, busy))
            except OSError as error:
                raise cannot_write(self.path, error) from error
            yield

    def begin(self, record: Mapping[str, Any], overwrite: bool) -> None:
        """Writes search.json. Raises ConfigError where another search is in the folder, RunError on a damaged file.

        record: what is searched, and how, as JSON; overwrite: whether to remove the search that is in the folder.
        """
        if overwrite:
            remove_files(self.path, self.search_file.name, SEARCH_FILES)
        if self.search_file.exists():
            for key, was, now in _differences(read_json(self.search_file), record):
                raise ConfigError(
                    f"{self} holds another search: {key} was {was!r}, now {now!r};"
                    " choose another --workdir, or replace it with --overwrite"
                )
        write_json(self.search_file, record)


def trial_folder(trial_id: str) -> str:
    """The folder of a trial within the search's, as KerasTuner names it."""
    return f"trials/trial_{trial_id}"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*a, *b]):
        was, now = a.get(key), b.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now)
        elif was != now:
            yield key, was, now
