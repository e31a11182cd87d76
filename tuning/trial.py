"""A trial: hyperparameters -> Config -> `train_and_evaluate`, and what KerasTuner has to know of it."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from cifar10_trainer.errors import ConfigError, FolderBusyError, RunError, RunInterrupted
from cifar10_trainer.run_folder import RunFolder
from cifar10_trainer.training import train_and_evaluate

from . import oracle
from .options import OBJECTIVES, Options
from .search_folder import SearchFolder

# Starts of a trial whose process dies each time without getting any further.
MAX_STARTS, MAX_OUT_OF_MEMORY_STARTS = 10, 2
WAIT_LEASES = 10  # that a trial taken over waits for the process that had it

SpaceFunction = Callable[[kt.HyperParameters], Config]
DatasetOrLoader = Dataset | Callable[[], Dataset]


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


def describe_search(space: SpaceFunction, data: Dataset) -> tuple[dict[str, Any], kt.HyperParameters]:
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


def make_search_oracle(
    record: dict[str, Any], hp: kt.HyperParameters, options: Options
) -> oracle.SearchOracle:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return oracle.make_oracle(
        options.tuner,
        epochs=record["defaults"]["epochs"],
        objective=kt.Objective(options.objective, OBJECTIVES[options.objective]),
        max_trials=options.max_trials,
        hyperparameters=hp,
        file=SearchFolder(options.workdir).state_file,
        search=digest[:16],
        baseline=options.baseline,
        stop_at=options.target if options.stop_at_target else None,
        lease=options.lease,
        seed=options.seed,
    )


class ConfigTuner(BaseTuner):
    """KerasTuner's side of a trial. The trial itself is an ordinary run, whose folder is the trial's.

    digest: of what is searched; lease: as the oracle's; show_epochs: whether to show the epochs as they pass;
    verbose: whether to tell of trials, as a worker that somebody watches.
    """

    def __init__(
        self,
        search_oracle: oracle.SearchOracle,
        space: SpaceFunction,
        dataset: Dataset,
        folder: Path,
        *,
        digest: str,
        lease: float,
        show_epochs: bool = False,
        verbose: int = 0,
    ):
        super().__init__(search_oracle, space, directory=str(folder.parent), project_name=folder.name)
        self.space, self.dataset, self.digest, self.show_epochs = space, dataset, digest, show_epochs
        self._lease = lease
        tf.get_logger().addFilter(_is_no_retracing_warning)
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
        if values.get(oracle.SEARCH) != self.digest:
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
            with self._heartbeats(trial.trial_id), count_starts(folder):
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
        saved = run.read_config() if run.has_run() else None
        stale = saved is not None and (
            Config.from_record(saved) != config
            or saved.get("fingerprint") != datasets.fingerprint(self.dataset)
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
                callbacks=[EpochLine(config.epochs)] if self.show_epochs else (),
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
    def _heartbeats(self, trial_id: str) -> Iterator[None]:
        """Lets the chief know, within, that this worker lives."""
        if isinstance(self.oracle, kt.Oracle):
            yield
            return
        ended = threading.Event()

        def send() -> None:
            while not ended.wait(self._lease / 6):
                with contextlib.suppress(grpc.RpcError):
                    self.oracle.get_trial(trial_id)

        threading.Thread(target=send, daemon=True).start()
        try:
            yield
        finally:
            ended.set()


def _is_no_retracing_warning(record: logging.LogRecord) -> bool:
    """Not that the step is traced anew for every trial: every trial has a network of its own."""
    return "tf.function retracing" not in record.getMessage()


class EpochLine(keras.callbacks.Callback):
    """One line of a terminal that follows the epochs of a trial."""

    def __init__(self, epochs: float):
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        text = ", ".join(f"{k} {100 * v:.1f}%" for k, v in (logs or {}).items() if k.endswith("accuracy"))
        print(f"\r\033[K  epoch {epoch + 1} of {self.epochs:.3g}: {text}", end="", flush=True)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        print("\r\033[K", end="", flush=True)


@contextlib.contextmanager
def count_starts(folder: Path) -> Iterator[None]:
    """Counts the starts of a trial whose process died within. Raises RunError when it is the trial that kills it.

    Who ends a search by SIGKILL is patient with it; memory that runs out is told by the kernel's own count.
    """
    file, state = folder / "starts", RunFolder(folder).state_file
    starts, before = 0, _oom_kills()
    if file.exists() and not (state.exists() and state.stat().st_mtime > file.stat().st_mtime):  # no progress
        starts, before = map(int, file.read_text().split())
    if starts >= MAX_STARTS:
        raise RunError(f"its process died {starts} times, and nobody knows of what")
    if starts >= MAX_OUT_OF_MEMORY_STARTS and _oom_kills() > before:
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
