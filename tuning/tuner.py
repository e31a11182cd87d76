"""tune(): a whole search, in this process or as the chief of worker processes."""

from __future__ import annotations

import pickle
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import keras_tuner as kt

from cifar10_trainer import process
from cifar10_trainer.config import Config
from cifar10_trainer.datasets import Dataset
from cifar10_trainer.errors import ConfigError, RunError, RunInterrupted, interrupted, shown, unknown
from cifar10_trainer.process import line_printer

from . import chief
from .figure import search_figure
from .leaderboard import Leaderboard, Row
from .options import Options
from .oracle import SearchOracle
from .search_folder import SearchFolder
from .trial import (
    ConfigTuner,
    DatasetOrLoader,
    SpaceFunction,
    describe_search,
    load,
    make_config,
    make_search_oracle,
)
from .worker import project_errors, run_worker

FIXED_OPTIONS = ("tuner", "objective", "seed", "baseline")  # they stay the same when a search is resumed


OPTION_NAMES = tuple(field.name for field in fields(Options))


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        workdir: the search's folder.
        rows: all trials: the completed ones, the best first, then the failed ones.
        best_config: the Config of the best trial. Training it gives the same result.
    """

    workdir: Path
    rows: Sequence[Row]
    best_config: Config

    @property
    def best(self) -> Row:
        """The best trial."""
        return self.rows[0]


@process.enduring_output()
def tune(space: SpaceFunction, dataset: DatasetOrLoader, **settings: Any) -> SearchResult | None:
    """Searches `space` for the Config with the best validation accuracy, and fills the search's folder.

    If the folder holds the same search already, the search resumes. It never uses the test images.

    Args:
        space: a function that draws hyperparameters from KerasTuner's `hp`, and returns the Config to train.
        dataset: the images, as a Dataset or (images, labels), or a function that loads them, which each process calls once.
        settings: the fields of `Options`, by keyword: workdir, tuner, max_trials, target, workers and so on. `patience` is
            the old name of chief_timeout. With workers, `space` and `dataset` must be picklable, as the functions of a
            module are.

    Returns:
        The result of the search; None for the role "worker".

    Raises:
        ConfigError: if an argument is wrong, or the folder holds another search.
        FolderBusyError: if another process searches in the folder.
        RunError: if all trials failed, or a signal stopped the search (RunInterrupted).
    """
    options = _options(settings)
    if options.local_workers:
        _check_picklable(space=space, dataset=dataset)
    if options.role == "worker":
        # The id does not contain the name of the host: KerasTuner takes an id with "chief" in it for the chief's.
        run_worker(space, dataset, options, f"worker-{uuid.uuid4().hex}")
        return None
    log = line_printer(options.verbose)
    data = load(dataset)
    description, hp = describe_search(space, data)
    folder = SearchFolder(options.workdir)
    with folder.lock():
        fixed = {name: getattr(options, name) for name in FIXED_OPTIONS}
        folder.begin({**fixed, **description}, options.overwrite)
        oracle = make_search_oracle(description, hp, options)
        oracle.check = folder.check_there
        leaderboard = Leaderboard(
            oracle,
            folder,
            lambda hp: make_config(space, hp, data),
            target=options.target,
            max_trials=options.max_trials,
            log=log,
        )
        show_epochs = bool(options.verbose) and sys.stdout.isatty()
        tuner = ConfigTuner(oracle, space, data, folder.trials, show_epochs=show_epochs)
        oracle.reload()
        _log_start(leaderboard, hp, data, options)
        if oracle.trials:
            leaderboard.write()
        try:
            _search(tuner, leaderboard, space, dataset if callable(dataset) else data, options)
        except (RunInterrupted, KeyboardInterrupt) as error:
            oracle.save()  # the seconds until now
            progress = f"stopped: {len(oracle.end_order)} of {options.max_trials} trials are done"
            # A KeyboardInterrupt is the second signal, which the trial does not wait for.
            at_once = isinstance(error, KeyboardInterrupt)
            saved = "everything up to the last save of the trial" if at_once else "everything"
            raise interrupted(progress, folder, options.overwrite, saved) from error
        return _conclude(leaderboard, hp, options)


def _options(settings: dict[str, Any]) -> Options:
    """The options of these names. Raises ConfigError where a name or a value is not allowed."""
    if "patience" in settings and "chief_timeout" not in settings:
        settings["chief_timeout"] = settings.pop("patience")
    for name in settings:
        if name not in OPTION_NAMES:
            raise unknown("setting", name, OPTION_NAMES)
    return Options(**settings)


def _check_picklable(**functions: Any) -> None:
    """Raises ConfigError where a function cannot be sent to a worker process, which imports it by its name."""
    main = sys.modules["__main__"]
    typed = getattr(main, "__spec__", None) is None and not hasattr(main, "__file__")  # in a notebook
    for name, function in functions.items():
        try:
            pickle.dumps(function if callable(function) else None)
            if typed and getattr(function, "__module__", "") == "__main__":
                raise pickle.PicklingError("it was typed in")
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{name} is {shown(function)}, which no worker process can import; allowed with workers: a function of a module"
            ) from error


def _log_start(leaderboard: Leaderboard, hp: kt.HyperParameters, data: Dataset, options: Options) -> None:
    """Logs the tuner, the hyperparameters, the budget, the target and the data."""
    oracle, log = leaderboard.oracle, leaderboard.log
    names, target = ", ".join(p.name for p in hp.space), f"{100 * options.target:.4g}%"
    log(
        f"search: {options.tuner} over {names}; {options.max_trials} trials; target {target} validation accuracy"
    )
    log(f"data: {data.name} from {data.source}: {len(data.train_images):,} images to train and validate on")
    if oracle.trials:
        log(f"resumed: {len(oracle.end_order)} trials are done")


def _search(
    tuner: ConfigTuner,
    leaderboard: Leaderboard,
    space: SpaceFunction,
    dataset: DatasetOrLoader,
    options: Options,
) -> None:
    """Runs the remaining trials: in this process, or in worker processes of which it is the chief."""
    oracle, log = leaderboard.oracle, leaderboard.log
    if _is_finished(oracle, options):
        return
    if options.role == "alone" and not options.local_workers:
        with project_errors(options), tuner.signals:
            tuner.search()
        return
    address = chief.listening_address(options.chief)
    if options.role == "chief":
        oracle.wait_for_former_workers()
        log(
            f"chief: listening at {address}, without a password; to start a worker, add --role=worker --chief={address}"
        )
    pool = chief.WorkerPool(space, dataset, options, address, log)
    chief.run_chief(oracle, pool, address)


def _conclude(leaderboard: Leaderboard, hp: kt.HyperParameters, options: Options) -> SearchResult:
    """Writes the results and logs them. Raises RunError if all trials failed."""
    log = leaderboard.log
    leaderboard.write()
    rows, config, folder = leaderboard.rows(), leaderboard.best_config(), leaderboard.folder
    if config is None:
        reasons = [r.reason for r in sorted(rows, key=lambda r: r.trial) if r.reason]
        raise RunError(f"all {len(rows)} trials failed; the first: {(reasons or ['it did not begin'])[0]}")
    logarithmic = [p.name for p in hp.space if getattr(p, "sampling", "") == "log"]
    search_figure(rows, logarithmic, options.target, folder.figure_file)
    if not _is_finished(leaderboard.oracle, options):
        log(f"the space has no more than these {len(rows)} trials")
    log(f"\n{leaderboard.table()}\n\n{leaderboard.conclusion()}")
    names = ", ".join(
        path.name for path in (folder.leaderboard_file, folder.figure_file, folder.best_config_file)
    )
    log(f"files: {folder}/ ({names}; tensorboard --logdir={folder})")
    return SearchResult(folder.path, rows, config)


def _is_finished(oracle: SearchOracle, options: Options) -> bool:
    """Whether the budget is spent, or the target reached at which the search should stop."""
    reached = options.stop_at_target and (oracle.best_accuracy() or 0) >= options.target
    return reached or len(oracle.end_order) >= options.max_trials
