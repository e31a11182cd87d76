"""tune(): the whole search, in this process or as the chief of others."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import keras_tuner as kt

from cifar10_trainer import files
from cifar10_trainer.config import Config
from cifar10_trainer.errors import ConfigError, RunError, RunInterrupted, interrupted

from . import chief, oracle
from .figure import search_figure
from .leaderboard import Leaderboard, Row
from .options import Options
from .trial import DatasetOrLoader, SpaceFunction, Trainer, describe, make_config, make_oracle
from .worker import distributed, plain_errors, work

WRITTEN = ("trials", "tensorboard", "search.json", "leaderboard.csv", "best_config.json", "search.png")


@dataclass(frozen=True)
class Found:
    """What a search found. rows: its trials, the best first; best_config trains again what the best trial did."""

    workdir: Path
    rows: Sequence[Row]
    best_config: Config

    @property
    def best(self) -> Row:
        return self.rows[0]


def tune(space: SpaceFunction, dataset: DatasetOrLoader, **options: Any) -> Found | None:
    """Searches `space` for the Config with the best validation accuracy, and fills the search's folder.

    A search that is in the folder already goes on. Test images are never scored.

    Args:
        space: draws hyperparameters from KerasTuner's `hp`, and gives the Config to train.
        dataset: images, or a function that loads them: each worker calls it once.
        options: see `Options`: workdir, tuner, max_trials, target, stop_at_target, workers and so on. With workers,
            `space` and `dataset` are sent to processes: they must be picklable, so functions of a module.

    Returns: what was found; None for a worker.
    Raises: ConfigError for what cannot be; RunError where every trial failed, or the search was interrupted.
    """
    o = Options(**options)
    if o.role == "worker":
        # No host's name in it: KerasTuner takes any id with "chief" in it for the chief's.
        work(space, dataset, o, f"worker-{uuid.uuid4().hex}")
        return None
    say = print if o.verbose else lambda *_: None
    workdir = Path(o.workdir)
    data = dataset() if callable(dataset) else dataset
    record, hp = describe(space, data)
    with _claimed(workdir, o, record):
        # ---- what is searched
        chooser = make_oracle(record, hp, o)
        board = Leaderboard(
            chooser,
            workdir,
            lambda hp: make_config(space, hp, data),
            target=o.target,
            max_trials=o.max_trials,
            say=say,
        )
        trainer = Trainer(
            chooser,
            space,
            data,
            workdir / "trials",
            search=chooser.search,
            lease=o.lease,
            live=bool(o.verbose) and sys.stdout.isatty(),
        )
        chooser.reload()
        names, target = ", ".join(p.name for p in hp.space), f"{100 * o.target:.4g}%"
        say(f"search: {o.tuner} over {names}; {o.max_trials} trials; target {target} validation accuracy")
        say(
            f"data: {data.name} from {data.source}: {len(data.train_images):,} images to train and validate on"
        )
        if chooser.trials:
            say(f"resumed: {len(chooser.end_order)} trials are done")
            board.write()

        # ---- the trials
        try:
            _search(trainer, chooser, space, dataset, o, say)
        except (RunInterrupted, KeyboardInterrupt) as error:
            how = f"stopped: {len(chooser.end_order)} of {o.max_trials} trials are done"
            raise interrupted(how, workdir, o.overwrite) from error

        return _conclude(board, hp, o, say)


def _conclude(board: Leaderboard, hp: kt.HyperParameters, o: Options, say: Callable[[str], None]) -> Found:
    """Writes and tells what was found. Raises RunError where every trial failed."""
    board.write()
    rows, config, workdir = board.rows(), board.best_config(), board.workdir
    if config is None:
        reasons = [r.reason for r in sorted(rows, key=lambda r: r.trial) if r.reason]
        raise RunError(f"all {len(rows)} trials failed; the first: {(reasons or ['it never began'])[0]}")
    logarithmic = [p.name for p in hp.space if getattr(p, "sampling", "") == "log"]
    search_figure(rows, logarithmic, o.target, workdir / "search.png")
    if not _over(board.oracle, o):
        say(f"the space holds no more than these {len(rows)} trials")
    say(f"\n{board.table()}\n\n{board.verdict()}")
    say(f"files: {workdir}/ (leaderboard.csv, search.png, best_config.json; tensorboard --logdir={workdir})")
    return Found(workdir, rows, config)


def _search(
    trainer: Trainer,
    chooser: oracle.SearchOracle,
    space: SpaceFunction,
    dataset: DatasetOrLoader,
    o: Options,
    say: Callable[[str], None],
) -> None:
    """Runs trials until there are no more: in this process, or in others of which it is the chief."""
    if _over(chooser, o):
        return
    if o.role == "alone" and not o.local_workers:
        with plain_errors(o), trainer.signals:
            trainer.search()
        return
    address = chief.listening_address(o.chief)
    if o.role == "chief":
        chooser.wait_for_former_workers()
        say(
            f"chief: listening at {address}, without a password; for a worker, add --role=worker --chief={address}"
        )
    team = chief.Team(space, dataset, o, address, say)
    with distributed(chief.CHIEF, address):
        chief.lead(trainer, chooser, team)


def _over(chooser: oracle.SearchOracle, o: Options) -> bool:
    reached = o.stop_at_target and (chooser.best_accuracy() or 0) >= o.target
    return reached or len(chooser.end_order) >= o.max_trials


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*a, *b]):
        was, now = a.get(key), b.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now)
        elif was != now:
            yield key, was, now


@contextlib.contextmanager
def _claimed(workdir: Path, o: Options, record: dict[str, Any]) -> Iterator[None]:
    """Makes the search's folder this process's own, within. Raises ConfigError where another search is in it."""
    way_out = "choose another --workdir, or replace it with --overwrite"
    record = {"tuner": o.tuner, "objective": o.objective, "seed": o.seed, "baseline": o.baseline, **record}
    file = workdir / "search.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = os.open(
            workdir / ".lock", os.O_WRONLY | os.O_CREAT
        )  # not inherited, and gone with the process
    except OSError as error:
        raise RunError(f"cannot write to {workdir}: {error.strerror}; choose another --workdir") from error
    try:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"another process is searching in {workdir}; choose another --workdir"
                ) from None
        if o.overwrite:
            files.remove_files(workdir, file.name, WRITTEN)
        if file.exists():
            there = json.loads(file.read_text(encoding="utf-8"))
            for key, was, now in _differences(there, record):
                raise ConfigError(
                    f"{workdir} holds another search: {key} was {was!r}, now {now!r}; {way_out}"
                )
        files.write_atomic(file, json.dumps(record, indent=2) + "\n")
        yield
    finally:
        os.close(lock)
