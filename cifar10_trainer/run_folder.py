"""The run folder: the names, the lock and the contents of its files. No other module knows what it holds."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import Config
from .errors import ConfigError, FolderBusyError, RunError
from .files import cannot_write, folder_lock, read_json, remove_files, replacing, write_atomic, write_json
from .model_file import write_model

if TYPE_CHECKING:
    import keras

RUN_FILES = (  # what a run writes, and --overwrite removes
    "config.json",
    "history.csv",
    "metrics.json",
    "model.keras",
    "model.h5",
    "state.npz",
    "classification_report.txt",
    "report.html",
    "figures",
    "tensorboard",
)
HISTORY_COLUMNS = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")


class RunFolder:
    """The folder of one run.

    A run writes config.json before it trains and metrics.json last of all. So a folder with config.json alone holds an
    unfinished run, which state.npz resumes, and a folder with both holds a finished one.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.history_file = self.path / "history.csv"
        self.metrics_file = self.path / "metrics.json"
        self.model_file = self.path / "model.keras"
        self.hdf5_file = self.path / "model.h5"
        self.state_file = self.path / "state.npz"
        self.classification_report_file = self.path / "classification_report.txt"
        self.report_file = self.path / "report.html"
        self.figures = self.path / "figures"
        self.tensorboard = self.path / "tensorboard"

    def __str__(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder, and keeps other runs out of it. A folder that was made and left empty is removed again.

        Raises FolderBusyError where another run is in it, RunError where it cannot be written to.
        """

        def busy() -> None:
            raise FolderBusyError(
                f"another run is at work in {self}; wait for its end, or choose another folder with --workdir"
            )

        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(self.path, busy))
                (self.path / ".writable").touch()
                (self.path / ".writable").unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(self.path, error) from error
            yield

    def remove_run(self) -> None:
        """Removes what an earlier run wrote, where config.json shows that there was one. Raises RunError."""
        remove_files(self.path, self.config_file.name, RUN_FILES)

    # ---- config.json and metrics.json

    def has_run(self) -> bool:
        """Whether a run has begun in the folder."""
        return self.config_file.exists()

    def is_finished(self) -> bool:
        """Whether the run in the folder is finished."""
        return self.metrics_file.exists()

    def read_config(self) -> dict[str, Any]:
        """The record in config.json: the Config, and what the run found (`config.RECORDED`). Raises RunError."""
        return read_json(self.config_file)

    def write_config(self, record: Mapping[str, Any]) -> None:
        write_json(self.config_file, record)

    def read_metrics(self) -> dict[str, Any]:
        """The contents of metrics.json. Raises RunError."""
        return read_json(self.metrics_file)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Writes metrics.json, which makes the run a finished one, and removes the state. Raises RunError."""
        write_json(self.metrics_file, metrics)
        self.state_file.unlink(missing_ok=True)

    # ---- history.csv

    def write_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes history.csv, one row an epoch; the keys are HISTORY_COLUMNS, and None or a missing key is empty.

        Numbers are written so that `read_history` gives back the same ones. Raises ValueError on another key.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            # int() and float() because a NumPy number's repr is not its value
            writer.writerow(
                {k: v if v is None or isinstance(v, int) else repr(float(v)) for k, v in row.items()}
            )
        write_atomic(self.history_file, text.getvalue())

    def read_history(self) -> list[dict[str, Any]]:
        """The rows of history.csv: numbers, None where empty. Raises RunError where it is damaged."""
        path = self.history_file
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = csv.reader(file, strict=True)
                columns = next(rows, [])
                if tuple(columns) != HISTORY_COLUMNS:
                    raise ValueError(f"its columns are {columns}, not {', '.join(HISTORY_COLUMNS)}")
                return [{k: _number(v) for k, v in zip(columns, row, strict=True)} for row in rows]
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"cannot read {path}: {error}") from error

    # ---- model.keras

    def save_model(self, model: keras.Model, path: Path | None = None) -> None:
        """Saves `model` as model.keras, or as `path`, in the format that its name ends in. Raises RunError."""
        with replacing(path or self.model_file) as temporary:
            write_model(model, temporary)

    # ---- state.npz

    def write_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes state.npz, whole or not at all. Raises RunError."""
        with replacing(self.state_file) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes them for its own options

    def unfinished_state(self, config: Config) -> dict[str, np.ndarray] | None:
        """The arrays in state.npz of an unfinished run of `config`; None where no run was saved here.

        Raises ConfigError where the folder holds a finished run or one of another config, RunError on damaged files.
        """
        if not self.has_run():
            return None
        if self.is_finished():
            raise ConfigError(
                f"{self} holds a finished run; choose another --workdir, or replace it with --overwrite"
            )
        self._check_same(config)
        if not self.state_file.exists():
            return None
        try:
            with open(self.state_file, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise self.damaged_state(error) from error

    def _check_same(self, config: Config) -> None:
        """Raises ConfigError where the unfinished run in the folder has another config."""
        try:
            there = Config.from_record(self.read_config()).to_dict()
        except (RunError, ValueError, TypeError) as error:
            raise RunError(
                f"{self.config_file} is damaged ({error}); choose another --workdir, or replace it with --overwrite"
            ) from error
        ours = config.to_dict()
        different = [key for key in ours if there.get(key) != ours[key]]
        if different:
            key = different[0]
            raise ConfigError(
                f"{self} holds an unfinished run of another configuration ({key} {there.get(key)!r}, now {ours[key]!r});"
                f" choose another --workdir, or replace it with --overwrite"
            )

    def damaged_state(self, error: Exception) -> RunError:
        """The one-line error for a state.npz that cannot be used."""
        reason = " ".join(str(error).split())[:200]
        return RunError(
            f"{self.state_file} is damaged, or of other data ({reason}); delete it to begin this run again"
        )


def _number(text: str) -> int | float | None:
    try:
        return int(text) if text else None
    except ValueError:
        return float(text)
