"""tune(): the whole search, in this process or as the chief of others."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras_tuner as kt

from cifar10_trainer.config import Config
from cifar10_trainer.errors import RunError, RunInterrupted, interrupted

from . import chief, oracle
from .figure import search_figure
from .leaderboard import Leaderboard, Row
from .options import Options
from .search_folder import SearchFolder
from .trial import DatasetOrLoader, SpaceFunction, Trainer, describe, make_config, make_oracle
from .worker import distributed, plain_errors, work


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
    folder = SearchFolder(o.workdir)
    data = dataset() if callable(dataset) else dataset
    record, hp = describe(space, data)
    with folder.lock():
        # ---- what is searched
        how = {"tuner": o.tuner, "objective": o.objective, "seed": o.seed, "baseline": o.baseline}
        folder.begin({**how, **record}, o.overwrite)
        chooser = make_oracle(record, hp, o)
        board = Leaderboard(
            chooser,
            folder,
            lambda hp: make_config(space, hp, data),
            target=o.target,
            max_trials=o.max_trials,
            say=say,
        )
        trainer = Trainer(
            chooser,
            space,
            data,
            folder.trials,
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
            progress = f"stopped: {len(chooser.end_order)} of {o.max_trials} trials are done"
            raise interrupted(progress, folder, o.overwrite) from error

        return _conclude(board, hp, o, say)


def _conclude(board: Leaderboard, hp: kt.HyperParameters, o: Options, say: Callable[[str], None]) -> Found:
    """Writes and tells what was found. Raises RunError where every trial failed."""
    board.write()
    rows, config, folder = board.rows(), board.best_config(), board.folder
    if config is None:
        reasons = [r.reason for r in sorted(rows, key=lambda r: r.trial) if r.reason]
        raise RunError(f"all {len(rows)} trials failed; the first: {(reasons or ['it never began'])[0]}")
    logarithmic = [p.name for p in hp.space if getattr(p, "sampling", "") == "log"]
    search_figure(rows, logarithmic, o.target, folder.figure_file)
    if not _over(board.oracle, o):
        say(f"the space holds no more than these {len(rows)} trials")
    say(f"\n{board.table()}\n\n{board.verdict()}")
    names = ", ".join(
        path.name for path in (folder.leaderboard_file, folder.figure_file, folder.best_config_file)
    )
    say(f"files: {folder}/ ({names}; tensorboard --logdir={folder})")
    return Found(folder.path, rows, config)


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
