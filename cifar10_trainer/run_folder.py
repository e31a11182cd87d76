"""The run folder: the names, the lock and the contents of its files. No other module knows what it holds."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .archives import check_npz
from .config import Config
from .errors import ConfigError, RunError, one_line, shown
from .files import (
    LockedFolder,
    cannot_write,
    parse_json,
    read_json,
    regular_file,
    remove,
    remove_files,
    remove_leftovers,
    replacing,
    sync,
    write_atomic,
    write_json,
)
from .machine import check_fits
from .model_file import write_model
from .process import Log

if TYPE_CHECKING:
    import keras

# What a run writes, and --overwrite removes in this order. config.json shows whose the others are, so it goes last.
RUN_FILES = (
    "state.npz",
    "state.previous.npz",
    "metrics.json",
    "history.csv",
    "model.keras",
    "model.h5",
    "split.csv",
    "classification_report.txt",
    "report.html",
    "figures",
    "tensorboard",
    "config.json",
)
FOLDS_FILE = "folds.json"  # of a finished cross-validation, in the folder around those of its runs
SEARCH_FILE = "search.json"  # of a search
HISTORY_COLUMNS = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")
SPLIT_COLUMNS = ("file", "class", "part")


def existing(workdir: str | os.PathLike[str]) -> RunFolder:
    """The run folder at `workdir`, which a command reads. Raises ConfigError where no folder is."""
    folder = RunFolder(workdir)
    if not folder.path.is_dir():
        raise ConfigError(f"no run folder at {folder}; allowed: one written by python -m cifar10_trainer")
    return folder


class FoldsFolder(LockedFolder):
    """The folder of a cross-validation, around those of its runs."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self.file = self.path / FOLDS_FILE

    def fold(self, folds: int, i: int) -> RunFolder:
        """The run folder of fold i, from 0. Raises RunError where this folder was removed since it was locked."""
        self.check_there()
        return fold_folder(self.path, folds, i)

    def write(self, summary: Mapping[str, Any]) -> None:
        """Writes folds.json, which makes the cross-validation a finished one. Raises RunError."""
        self.check_there()
        write_json(self.file, summary, durable=True, parents=False)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder, and keeps other cross-validations out of it.

        Raises FolderBusyError where one is in it, ConfigError where it holds a run or a search, RunError where it cannot be made.
        """
        busy = f"another cross-validation is at work in {self}; wait for its end, or choose another folder with --workdir"
        with self._locked(busy):
            check_kind(self.path, "cross-validation")
            yield


def fold_folder(workdir: Path, folds: int, i: int) -> RunFolder:
    """The run folder of fold i, from 0, of a cross-validation in `workdir`."""
    return RunFolder(workdir / f"fold-{i + 1}-of-{folds}")


def holds_run(names: Collection[str]) -> bool:
    """Whether a folder with files of these names is that of a run, a cross-validation or a search."""
    begun = RUN_FILES[-1] in names and not {
        "model.keras",
        "state.npz",
        "history.csv",
        "split.csv",
    }.isdisjoint(names)
    return begun or FOLDS_FILE in names or SEARCH_FILE in names


def check_kind(folder: Path, own: str) -> None:
    """Raises ConfigError where a folder holds a run, a cross-validation or a search, but not what it is to hold: `own`."""
    found = {
        "run": RunFolder(folder).has_trained(),
        "cross-validation": (folder / FOLDS_FILE).exists() or any(folder.glob("fold-*-of-*")),
        "search": (folder / SEARCH_FILE).exists(),
    }
    for kind, is_there in found.items():
        if is_there and kind != own:
            raise ConfigError(f"{folder} holds a {kind}; choose another --workdir for a {own}")


class RunFolder(LockedFolder):
    """The folder of one run.

    A run writes config.json before it trains and metrics.json last of all. So a folder with config.json alone holds an
    unfinished run, which state.npz resumes, and a folder with both holds a finished one. The state before the newest one
    is kept as state.previous.npz until the run is finished. Each state holds the config that it belongs to.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self.config_file = self.path / "config.json"
        self.history_file = self.path / "history.csv"
        self.metrics_file = self.path / "metrics.json"
        self.model_file = self.path / "model.keras"
        self.hdf5_file = self.path / "model.h5"
        self.state_file = self.path / "state.npz"
        self.split_file = self.path / "split.csv"
        self.previous_state_file = self.path / "state.previous.npz"
        self.classification_report_file = self.path / "classification_report.txt"
        self.report_file = self.path / "report.html"
        self.figures = self.path / "figures"
        self.tensorboard = self.path / "tensorboard"
        self._state_is_whole = False  # whether state.npz has been read back whole

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder, and keeps other runs out of it. A folder that was made and left empty is removed again.

        Removes the temporary files that killed runs left.

        Raises FolderBusyError where another run is in it, RunError where it cannot be written to, ConfigError where it holds
        files of a run's names and no run: they may be somebody's own.
        """
        busy = f"another run is at work in {self}; wait for its end, or choose another folder with --workdir"
        with self._locked(busy):
            self._check_whose()
            yield

    def _check_whose(self) -> None:
        """Raises ConfigError where no run is in the folder, but files that one would replace, or something else of ours."""
        check_kind(self.path, "run")
        found = [name for name in RUN_FILES if (self.path / name).exists()]
        if found and not self._states() and not self._has_config_of_a_run():
            raise ConfigError(
                f"{self} holds {', '.join(found)}, but no run, whose {self.config_file.name} names a recipe; choose another"
                " --workdir, or move them away"
            )
        for place in (self.figures, self.tensorboard):
            if place.exists() and not place.is_dir():
                raise ConfigError(f"{place} is a file; choose another --workdir, or move it away")

    def _has_config_of_a_run(self) -> bool:
        """Whether config.json is that of a run, or damaged, which whoever reads it reports."""
        try:
            return self.has_run() and "recipe" in self.read_config()
        except RunError:
            return True

    def _tidy(self) -> None:
        (self.path / ".writable").touch()
        (self.path / ".writable").unlink(missing_ok=True)
        remove_leftovers(self.path, RUN_FILES)
        if self.figures.is_dir():
            remove_leftovers(self.figures, [path.name for path in self.figures.iterdir()])

    def remove_run(self) -> None:
        """Removes what an earlier run wrote, where config.json shows that there was one. Raises RunError."""
        remove_files(self.path, self.config_file.name, RUN_FILES[:-1])

    # ---- config.json and metrics.json

    def has_run(self) -> bool:
        """Whether a run has begun in the folder."""
        return self.config_file.exists()

    def is_finished(self) -> bool:
        """Whether the run in the folder is finished."""
        return self.metrics_file.exists()

    def has_trained(self) -> bool:
        """Whether a run in the folder is finished, or can be resumed at a step."""
        return self.has_run() and (self.is_finished() or bool(self._states()))

    def read_config(self) -> dict[str, Any]:
        """The record in config.json: the Config, and what the run found (`config.RECORDED`). Raises RunError."""
        return read_json(self.config_file)

    def write_config(self, record: Mapping[str, Any], *, resumed: bool) -> None:
        """Writes config.json. Where no run is resumed, it first removes what would be taken for this run's. Raises RunError."""
        self.check_there()
        if not resumed:
            try:
                # The states last: they show that the others are no files of somebody's own.
                files = (self.metrics_file, self.history_file, self.model_file, *self._states())
                for path in (self.tensorboard, *files):
                    remove(path)
            except OSError as error:
                raise cannot_write(self.path, error) from error
        write_json(self.config_file, record, durable=True, parents=False)

    def read_metrics(self) -> dict[str, Any]:
        """The contents of metrics.json. Raises RunError."""
        return read_json(self.metrics_file)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Writes metrics.json, which makes the run a finished one, and removes the states. Raises RunError."""
        self.check_there()
        if self.history_file.exists():
            try:
                sync(self.history_file)  # until here the state held it, too
            except OSError as error:
                raise cannot_write(self.path, error) from error
        write_json(self.metrics_file, metrics, durable=True, parents=False)
        for path in self._states():
            with contextlib.suppress(OSError):  # the run is finished, whatever stays
                path.unlink(missing_ok=True)

    # ---- history.csv

    def write_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes history.csv, one row an epoch; the keys are HISTORY_COLUMNS, and None or a missing key is empty.

        Numbers are written so that `read_history` gives back the same ones. Raises ValueError on another key.
        """
        self.check_there()
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            # `float()`, because the repr of a NumPy number is not its value
            writer.writerow(
                {k: v if v is None or isinstance(v, int) else repr(float(v)) for k, v in row.items()}
            )
        write_atomic(self.history_file, text.getvalue(), parents=False)

    def read_history(self) -> list[dict[str, Any]]:
        """The rows of history.csv: numbers, None where empty. Raises RunError where it is damaged."""
        path = self.history_file
        try:
            with open(regular_file(path), newline="", encoding="utf-8") as file:
                rows = csv.reader(file, strict=True)
                columns = next(rows, [])
                if tuple(columns) != HISTORY_COLUMNS:
                    raise ValueError(f"its columns are {columns}, not {', '.join(HISTORY_COLUMNS)}")
                return [{k: _number(v) for k, v in zip(columns, row, strict=True)} for row in rows]
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"cannot read {path}: {error}") from error

    # ---- split.csv

    def write_split(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Writes split.csv: file, class and part of each picture of a folder; without pictures, nothing. Raises RunError.

        The names need not be UTF-8.
        """
        rows = list(rows)
        if not rows:
            return
        text = io.StringIO()
        # Python before 3.13 does not quote a carriage return by itself.
        unusual = any("\r" in file or "\r" in name for file, name, _ in rows)
        quoting: Any = csv.QUOTE_ALL if unusual else csv.QUOTE_MINIMAL
        writer = csv.writer(text, lineterminator="\n", quoting=quoting)
        writer.writerow(SPLIT_COLUMNS)
        writer.writerows(rows)
        content = text.getvalue().encode("utf-8", "surrogateescape")
        write_atomic(self.split_file, content, durable=True, parents=False)  # a state may be, too

    def read_split(self) -> list[tuple[str, str, str]] | None:
        """The rows of split.csv; None where there is none, as in runs on other data. Raises RunError where it is damaged."""
        if not self.split_file.exists():
            return None
        try:
            with open(self.split_file, newline="", encoding="utf-8", errors="surrogateescape") as file:
                head, *rows = csv.reader(file, strict=True)
            if tuple(head) != SPLIT_COLUMNS or any(len(row) != len(head) for row in rows):
                raise ValueError(f"its columns are not {', '.join(SPLIT_COLUMNS)}")
            return [(file, name, part) for file, name, part in rows]
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"cannot read {self.split_file}: {error}") from error

    # ---- model.keras

    def save_model(self, model: keras.Model, path: Path | None = None) -> None:
        """Saves `model` as model.keras, or as `path`, in the format that its name ends in. Raises RunError."""
        self.check_there()
        with replacing(path or self.model_file, durable=True, parents=False) as temporary:
            write_model(model, temporary)

    def model_digest(self) -> str | None:
        """Eight hexadecimal digits that stand for the bytes of model.keras; None where it cannot be read."""
        digest = 0
        with contextlib.suppress(OSError), open(self.model_file, "rb") as file:
            while piece := file.read(1 << 20):  # some hold hundreds of megabytes
                digest = zlib.crc32(piece, digest)
            return f"{digest:08x}"
        return None

    # ---- state.npz

    def _states(self) -> list[Path]:
        """The files of states that exist, the newest first."""
        return [path for path in (self.state_file, self.previous_state_file) if path.exists()]

    def write_state(self, config: Config, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes state.npz, whole or not at all, and reads it back. What was whole before becomes state.previous.npz.

        Args:
            config: of the run; `unfinished_state` compares it.
            arrays: by name; "config" is taken.

        Raises:
            RunError: if it cannot be written, or is not what was written.
        """
        self.check_there()
        with replacing(self.state_file, durable=True, parents=False) as temporary:
            np.savez(temporary, config=np.array(json.dumps(config.to_dict())), **arrays)  # type: ignore[arg-type]
            sync(temporary)
            _check_archive(temporary)
            if self._state_is_whole:
                os.replace(self.state_file, self.previous_state_file)
            self._state_is_whole = False  # while there is none
        self._state_is_whole = True

    def unfinished_state(
        self, config: Config, log: Log, any_strategy: bool = False
    ) -> dict[str, np.ndarray] | None:
        """The arrays of the newest whole state of an unfinished run of `config`; None where no run was saved here.

        Args:
            config: of the run.
            log: prints a line where the newest state is damaged, and the one before is taken.
            any_strategy: whether the strategy may be another one.

        Raises:
            ConfigError: if the folder holds a finished run or one of another config.
            RunError: if its files are damaged, or its state is of another config.
        """
        states = self._states()
        if not self.has_run():
            if states:
                raise self._foreign_state(states, f"has no {self.config_file.name} beside it")
            return None
        if self.is_finished():
            raise ConfigError(
                f"{self} holds a finished run; choose another --workdir, or replace it with --overwrite"
            )
        self._check_same(config, any_strategy)
        errors: list[Exception] = []
        for path in states:
            try:
                arrays = _read_arrays(path)
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
                errors.append(error)
                continue
            self._check_config_of(arrays, config, any_strategy)
            if errors:
                log(
                    f"{states[0]} is damaged ({one_line(errors[0])}); resuming from the state before it, {path}"
                )
            self._state_is_whole = path == self.state_file
            return arrays
        if errors:
            raise self.damaged_state(errors[0])
        return None

    def _check_config_of(self, arrays: dict[str, np.ndarray], config: Config, any_strategy: bool) -> None:
        """Takes the config out of a state. Raises RunError where it is another one than `config`."""
        if "config" not in arrays:  # version 1.0.0 wrote none; config.json is all that shows it
            return
        try:
            there = Config.from_dict(parse_json(str(arrays.pop("config"))))
        except (ValueError, TypeError) as error:
            raise self.damaged_state(error) from error
        if other := difference(there, config, any_strategy):
            why = f"is of another configuration ({other})"
            raise self._foreign_state(self._states(), why, or_allow_it(other))

    def _foreign_state(self, states: list[Path], why: str, hint: str = "") -> RunError:
        """The one-line error for a state that does not belong to the run that is asked for."""
        return RunError(
            f"{states[0]} {why}, so it is not resumed; choose another --workdir, or replace it with --overwrite{hint}"
        )

    def _check_same(self, config: Config, any_strategy: bool) -> None:
        """Raises ConfigError where the unfinished run in the folder has another config."""
        try:
            there = Config.from_record(self.read_config())
        except (RunError, ValueError, TypeError) as error:
            raise RunError(
                f"{self.config_file} is damaged ({error}); choose another --workdir, or replace it with --overwrite"
            ) from error
        if other := difference(there, config, any_strategy):
            raise ConfigError(
                f"{self} holds an unfinished run of another configuration ({other});"
                f" choose another --workdir, or replace it with --overwrite{or_allow_it(other)}"
            )

    def resume(
        self, config: Config, log: Log, any_strategy: bool = False
    ) -> tuple[Config, dict[str, np.ndarray] | None]:
        """`unfinished_state` of `config` and, where there is a state, the values that the run chose for `config.adapt`."""
        chosen = config
        if config.adapt and self.has_run() and not self.is_finished():
            # What is damaged, or does not fit `config`, `unfinished_state` reports.
            with contextlib.suppress(RunError, ValueError, TypeError):
                there = Config.from_record(self.read_config())
                chosen = config.override(**{name: getattr(there, name) for name in config.adapt}, adapt=())
        state = self.unfinished_state(chosen, log, any_strategy)
        return config if state is None else chosen, state

    def damaged_state(self, error: Exception) -> RunError:
        """The one-line error where no state can be used."""
        files = self._states()
        is_damaged, it = ("are damaged", "both") if len(files) == 2 else ("is damaged", "it")
        return RunError(
            f"{' and '.join(map(str, files))} {is_damaged}, or of other data ({one_line(error)});"
            f" delete {it} to begin this run again"
        )


def difference(there: Config, ours: Config, any_strategy: bool) -> str:
    """The first setting that differs, as in "seed 0, now 7"; the strategy last; empty where none does."""
    was, now = there.to_dict(), ours.to_dict()
    keys = [key for key in {**now, **was} if was.get(key) != now.get(key)]
    keys.sort(key=lambda key: key == "strategy")
    if any_strategy and keys == ["strategy"]:
        return ""
    return f"{keys[0]} {shown(was.get(keys[0]))}, now {shown(now.get(keys[0]))}" if keys else ""


def or_allow_it(what: str) -> str:
    """The end of an error about this difference: the flag that allows it, if there is one."""
    return ", or allow it with --allow_replica_change" if what.startswith("strategy ") else ""


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a state. Raises RunError where they do not fit into memory, other errors where it is damaged."""
    check_fits(check_npz(regular_file(path)), f"the state in {path}", "use a machine with more memory")
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
        return dict(found)


def _check_archive(path: Path) -> None:
    """Reads a zip archive whole and compares its checksums. Raises OSError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise OSError(errno.EIO, f"what was written reads back damaged ({one_line(error)})") from error
    if damaged is not None:
        raise OSError(errno.EIO, f"what was written reads back damaged ({damaged})")


def _number(text: str) -> int | float | None:
    try:
        return int(text) if text else None
    except ValueError:
        return float(text)
