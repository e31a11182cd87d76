"""tune(): hyperparameters -> Config -> `train_and_evaluate`, trial after trial, the images loaded once."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import grpc
import keras
import keras_tuner as kt
import tensorflow as tf
from keras_tuner import errors
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.engine.trial import Trial

from cifar10_trainer import datasets, files, models, runtime
from cifar10_trainer.config import Config
from cifar10_trainer.datasets import Dataset
from cifar10_trainer.errors import ConfigError, FolderBusyError, RunError, RunInterrupted, interrupted
from cifar10_trainer.run_folder import RunFolder
from cifar10_trainer.training import train_and_evaluate

from . import oracle, parallel
from .figure import search_figure
from .leaderboard import Leaderboard, Row
from .options import OBJECTIVES, Options

WRITTEN = ("trials", "tensorboard", "search.json", "leaderboard.csv", "best_config.json", "search.png")
# Starts of a trial whose process dies each time without getting any further.
MAX_STARTS, MAX_OUT_OF_MEMORY = 10, 2
WAIT_LEASES = 10  # that a trial taken over waits for the process that had it

SpaceFunction = Callable[[kt.HyperParameters], Config]
DatasetOrLoader = Dataset | Callable[[], Dataset]


@dataclass(frozen=True)
class Found:
    """What a search found. rows: its trials, the best first; best_config trains again what the best trial did."""

    workdir: Path
    rows: Sequence[Row]
    best_config: Config

    @property
    def best(self) -> Row:
        return self.rows[0]


# ---- a trial ---------------------------------------------------------------------------------------------------


def make_config(space: SpaceFunction, hp: kt.HyperParameters, data: Dataset) -> Config:
    """The Config of a trial on `data`: the space's, for the share of its epochs that the oracle gives it."""
    config = space(hp)
    if not isinstance(config, Config):
        raise ConfigError(
            f"the space gives a {type(config).__name__}; allowed: a function of hp that gives a Config"
        )
    epochs = float(f"{config.epochs * hp.values.get(oracle.SHARE, 1.0):.6g}")
    size = {"image_size": data.input_shape[0]} if data.name == "folder" else {}  # the others have one size
    return config.override(dataset=data.name, epochs=epochs, **size)


class Trainer(BaseTuner):
    """KerasTuner's side of a trial. The trial itself is an ordinary run, whose folder is the trial's.

    search: digest of what is searched; lease: as the oracle's; live: whether to show the epochs as they pass;
    verbose: whether to tell of trials, as a worker that somebody watches.
    """

    def __init__(
        self,
        search_oracle: oracle.SearchOracle,
        space: SpaceFunction,
        dataset: Dataset,
        folder: Path,
        *,
        search: str,
        lease: float,
        live: bool = False,
        verbose: int = 0,
    ):
        super().__init__(search_oracle, space, directory=str(folder.parent), project_name=folder.name)
        self.space, self.dataset, self.search_digest, self.live = space, dataset, search, live
        self._lease = lease
        tf.get_logger().addFilter(_worth_telling)
        self._waiting, self.verbose = False, verbose
        self.signals = runtime.Signals()

    def save(self) -> None:
        """The oracle's file is all there is to save; a worker has none."""
        if isinstance(self.oracle, kt.Oracle):
            self.oracle.save()

    def pre_create_trial(self) -> None:
        if self._waiting:  # asked, and got nothing to do
            time.sleep(1)
        self._waiting = True

    def on_trial_begin(self, trial: Trial) -> None:
        self._waiting = False
        if self.verbose:
            print(f"trial {int(trial.trial_id) + 1}: training")

    def run_trial(self, trial: Trial) -> dict[str, float]:
        values = trial.hyperparameters.values
        if values.get(oracle.SEARCH) != self.search_digest:
            raise errors.FatalError(
                "the chief searches something else: start the worker with the chief's flags"
            )
        folder = Path(self.get_trial_dir(trial.trial_id))
        try:
            if self.signals.caught:  # too late for the trial before
                raise RunInterrupted(f"stopped by {self.signals.caught}")
            config = make_config(self.space, trial.hyperparameters, self.dataset)
            keras.utils.clear_session()  # of the trial before
            gc.collect()
            with self._signs_of_life(trial.trial_id), _counted_starts(folder):
                for _ in range(round(WAIT_LEASES * self._lease)):
                    with contextlib.suppress(
                        FolderBusyError
                    ):  # who had the trial was taken for dead: it may yet end it
                        return self._train(config, folder)
                    time.sleep(1)
                return self._train(config, folder)
        except RunInterrupted as error:
            raise errors.FatalError(str(error)) from error
        except Exception as error:  # whatever it is, it is this trial's, and the search goes on
            # Raised, it would be printed with its traceback. The number is not looked at.
            values[oracle.FAILURE] = _reason(error)
            return {self.oracle.objective.name: 0.0}

    def _train(self, config: Config, folder: Path) -> dict[str, float]:
        """Runs `config` in `folder`, or finishes what a killed process began there."""
        run = RunFolder(folder)
        there = run.read_config() if run.has_run() else None
        stale = there is not None and (
            Config.from_record(there) != config
            or there.get("fingerprint") != datasets.fingerprint(self.dataset)
        )
        before = 0.0
        if run.history_file.exists() and not stale:
            before = sum(row["seconds"] for row in run.read_history())
        began = time.time()
        if run.is_finished() and not stale:  # finished, but not reported
            metrics = run.read_metrics()
        else:
            metrics = train_and_evaluate(
                config,
                folder,
                dataset=self.dataset,
                overwrite=stale,
                callbacks=[_Live(config.epochs)] if self.live else (),
                verbose=0,
                full_report=False,
                score_test=False,
            )
        losses = [row["val_loss"] for row in run.read_history() if row["val_loss"] is not None]
        return {
            "val_accuracy": metrics["best_val_accuracy"],
            "val_loss": min(losses),
            "epochs": min(config.epochs, metrics["epochs"]),
            "parameters": metrics["params"],
            "pflop": metrics["pflop"],
            "seconds": before + time.time() - began,
        }

    @contextlib.contextmanager
    def _signs_of_life(self, trial_id: str) -> Iterator[None]:
        """Lets the chief know, within, that this worker lives."""
        if isinstance(self.oracle, kt.Oracle):
            yield
            return
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self._lease / 6):
                with contextlib.suppress(grpc.RpcError):
                    self.oracle.get_trial(trial_id)

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            over.set()


def _worth_telling(record: logging.LogRecord) -> bool:
    """Not that the step is traced anew for every trial: every trial has a network of its own."""
    return "tf.function retracing" not in record.getMessage()


class _Live(keras.callbacks.Callback):
    """One line of a terminal that follows the epochs of a trial."""

    def __init__(self, epochs: float):
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch, logs=None):
        told = ", ".join(f"{k} {100 * v:.1f}%" for k, v in (logs or {}).items() if k.endswith("accuracy"))
        print(f"\r\033[K  epoch {epoch + 1} of {self.epochs:.3g}: {told}", end="", flush=True)

    def on_train_end(self, logs=None):
        print("\r\033[K", end="", flush=True)


@contextlib.contextmanager
def _counted_starts(folder: Path) -> Iterator[None]:
    """Counts the starts of a trial whose process died within. Raises RunError when it is the trial that kills it.

    Who ends a search by SIGKILL is patient with it; memory that runs out is told by the kernel's own count.
    """
    file, state = folder / "starts", RunFolder(folder).state_file
    starts, before = 0, _oom_kills()
    if file.exists() and not (state.exists() and state.stat().st_mtime > file.stat().st_mtime):  # no progress
        starts, before = map(int, file.read_text().split())
    if starts >= MAX_STARTS:
        raise RunError(f"its process died {starts} times, and nobody knows of what")
    if starts >= MAX_OUT_OF_MEMORY and _oom_kills() > before:
        raise RunError(
            f"out of memory: the system ended its process, {starts} times; use a smaller batch_size"
        )
    files.write_atomic(file, f"{starts + 1} {before}")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _oom_kills() -> int:
    """Processes that Linux has ended since it started because memory ran out; 0 on other systems."""
    try:
        return int(Path("/proc/vmstat").read_text().split("oom_kill ")[1].split()[0])
    except (OSError, IndexError):
        return 0


def _reason(error: Exception) -> str:
    """Why a trial failed, in a line."""
    if isinstance(error, tf.errors.ResourceExhaustedError | MemoryError):
        error = runtime.out_of_memory(error if str(error) else MemoryError("no memory"))
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ConfigError | RunError) else f"{type(error).__name__}: {text}"


# ---- the search ------------------------------------------------------------------------------------------------


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
        chooser = _make_oracle(record, hp, o)
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


def work(space: SpaceFunction, dataset: DatasetOrLoader, o: Options, tuner_id: str) -> None:
    """Takes trials from the chief at `o.chief` until there are no more.

    Raises ConfigError or RunError where that cannot be, as when no chief answers.
    """
    from keras_tuner.src.distribute import oracle_client

    assert o.chief is not None
    oracle_client.TIMEOUT = o.patience  # it is an hour, and no argument
    data = dataset() if callable(dataset) else dataset
    record, hp = describe(space, data)
    with parallel.distributed(tuner_id, o.chief), _plain_errors(o):
        mine = _make_oracle(record, hp, o)
        folder = Path(o.workdir) / "trials"
        trainer = Trainer(mine, space, data, folder, search=mine.search, lease=o.lease, verbose=o.verbose)
        trainer.oracle = parallel.PatientClient(trainer.oracle, o.patience)
        trainer.search()
    if o.verbose:
        print("the search is over")


def describe(space: SpaceFunction, data: Dataset) -> tuple[dict[str, Any], kt.HyperParameters]:
    """What is searched, as JSON and as hyperparameters. Raises ConfigError where it cannot be."""
    hp = kt.HyperParameters()
    try:
        config = make_config(space, hp, data)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # KerasTuner's, about a range
        raise ConfigError(f"the space cannot be: {error}") from error
    if not hp.space:
        raise ConfigError("the space draws no hyperparameter; allowed: one or more, as hp.Float(...)")
    models.check_options(config.architecture, config.options)
    if config.validation_fraction is None and data.validation is None:
        raise ConfigError(
            f"{config.recipe} holds out no validation images, and a search goes by them;"
            " allowed: a validation_fraction greater than 0"
        )
    parameters = {p.name: {"kind": type(p).__name__, **p.get_config()} for p in hp.space}
    record = {
        "dataset": data.name,
        "images": datasets.fingerprint(data),
        "hyperparameters": parameters,
        "defaults": config.to_dict(),
    }
    return json.loads(json.dumps(record)), hp


def _make_oracle(record: dict[str, Any], hp: kt.HyperParameters, o: Options) -> oracle.SearchOracle:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return oracle.make(
        o.tuner,
        epochs=record["defaults"]["epochs"],
        objective=kt.Objective(o.objective, OBJECTIVES[o.objective]),
        max_trials=o.max_trials,
        hyperparameters=hp,
        file=Path(o.workdir) / "trials" / "search_state.json",
        search=digest[:16],
        baseline=o.baseline,
        stop_at=o.target if o.stop_at_target else None,
        lease=o.lease,
        seed=o.seed,
    )


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
        with _plain_errors(o), trainer.signals:
            trainer.search()
        return
    address = parallel.listening_address(o.chief)
    if o.role == "chief":
        chooser.wait_for_former_workers()
        say(
            f"chief: listening at {address}, without a password; for a worker, add --role=worker --chief={address}"
        )
    team = parallel.Team(space, dataset, o, address, say)
    with parallel.distributed(parallel.CHIEF, address):
        parallel.lead(trainer, chooser, team)


def _over(chooser: oracle.SearchOracle, o: Options) -> bool:
    reached = o.stop_at_target and (chooser.best_accuracy() or 0) >= o.target
    return reached or len(chooser.end_order) >= o.max_trials


@contextlib.contextmanager
def _plain_errors(o: Options) -> Iterator[None]:
    """Turns KerasTuner's and gRPC's errors into the project's."""
    try:
        yield
    except errors.FatalError as error:
        kind = RunInterrupted if isinstance(error.__cause__, RunInterrupted) else RunError
        raise kind(str(error)) from error
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNKNOWN:  # it answered, with an error of its own
            raise RunError(f"the chief at {o.chief} failed: {error.details()}") from error
        code = error.code().name.lower().replace("_", " ")
        raise RunError(
            f"no answer from the chief at {o.chief} in {o.patience:g} s ({code}); start it, then this worker again"
        ) from error


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
