"""One trial of a search: hyperparameters -> Config -> `train_and_evaluate` -> metrics."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import keras_tuner as kt
import tensorflow as tf
from keras_tuner import errors
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.engine.hyperparameters import HyperParameter
from keras_tuner.engine.trial import Trial

from cifar10_trainer import adaptation, cluster, datasets, files, models, preparation, runtime
from cifar10_trainer.config import DATASETS, Config
from cifar10_trainer.datasets import Dataset
from cifar10_trainer.errors import (
    ConfigError,
    FolderBusyError,
    RunError,
    RunInterrupted,
    WriteError,
    one_line,
)
from cifar10_trainer.run_folder import RunFolder
from cifar10_trainer.training import train_and_evaluate

from . import oracle
from .options import OBJECTIVES, Options
from .search_folder import SearchFolder
from .space import Space

# How often a trial is started whose process dies each time without progress: in general, and if memory runs out.
MAX_STARTS, MAX_OUT_OF_MEMORY_STARTS = 10, 2

SpaceFunction = Callable[[kt.HyperParameters], Config]
Images = Dataset | tuple[Any, Any]  # a pair: images and labels
DatasetOrLoader = Images | Callable[[], Images]


def make_config(space: SpaceFunction, hp: kt.HyperParameters, data: Dataset) -> Config:
    """The Config of a trial.

    Args:
        space: hyperparameters -> Config.
        hp: the values of the trial. They may hold the share of the epochs to train, oracle.SHARE.
        data: the images to train on.

    Returns:
        The Config that `space` returns, for `data` and for that share of its epochs.

    Raises:
        ConfigError: if `space` does not return a Config, or one with wrong values.
    """
    config = space(hp)
    if not isinstance(config, Config):
        raise ConfigError(
            f"the space returns a {type(config).__name__}; allowed: a function of hp that returns a Config"
        )
    config = adaptation.adapt(config, len(data.train_labels), data.validation is not None)
    epochs = float(f"{config.epochs * hp.values.get(oracle.SHARE, 1.0):.6g}")
    # Arrays in memory have no name that a Config knows, and only the pictures of a folder were resized.
    dataset = {"dataset": data.name} if data.name in DATASETS else {}
    size = {"image_size": data.input_shape[0], "resize": data.resize} if data.name == "folder" else {}
    return config.override(epochs=epochs, **dataset, **size)


def describe_search(space: SpaceFunction, data: Dataset) -> tuple[dict[str, Any], kt.HyperParameters]:
    """Finds the hyperparameters that `space` draws, and checks its default Config.

    Args:
        space: hyperparameters -> Config.
        data: the images to train on.

    Returns:
        (description, hyperparameters): what is searched as JSON values, and the hyperparameters with their ranges and
        default values.

    Raises:
        ConfigError: if the space is empty or invalid, or holds out no validation images.
    """
    hp = kt.HyperParameters()
    try:
        config = make_config(space, hp, data)
        parameters = _described(_all_of(space, hp, data))
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # from KerasTuner, about a range
        raise ConfigError(f"the space is invalid: {error}") from error
    if not hp.space:
        raise ConfigError("the space draws no hyperparameter; allowed: one or more, as hp.Float(...)")
    models.check_options(config.architecture, config.options)
    of_cluster = config.strategy == "auto" and cluster.place_in_tf_config() is not None
    if of_cluster or config.strategy == "multi_worker":
        raise ConfigError(
            ("TF_CONFIG names a cluster" if of_cluster else "strategy is multi_worker")
            + ", but a trial trains on one machine; allowed: unset TF_CONFIG and another strategy; a search has --workers of its own"
        )
    if isinstance(space, Space):
        space.check_networks(data.input_shape, data.num_classes)
    if config.validation_fraction is None and data.validation is None:
        raise ConfigError(
            f"{config.recipe} holds out no validation images, but a search compares validation accuracies;"
            " allowed: a validation_fraction greater than 0"
        )
    description = {
        "dataset": data.name,
        "images": datasets.fingerprint(data),
        "hyperparameters": parameters,
        "defaults": config.to_dict(),
    }
    return json.loads(json.dumps(description)), hp


def _all_of(space: SpaceFunction, hp: kt.HyperParameters, data: Dataset) -> list[HyperParameter]:
    """The hyperparameters that `space` draws, those under conditions included. hp: as it draws them by default."""
    found, scopes, tried = hp.copy(), list(hp.inactive_scopes), []
    while scopes:
        scope = scopes.pop()
        if scope in tried:
            continue
        tried.append(scope)
        other = found.copy()
        other.values.update({condition.name: condition.values[0] for condition in scope})
        for parameter in other.space:  # not at random, as KerasTuner does: all processes find the same
            if other.is_active(parameter):
                other.values.setdefault(parameter.name, parameter.default)
        make_config(space, other, data)
        found.merge(other.space)
        scopes += other.inactive_scopes
    return found.space


def _described(parameters: list[HyperParameter]) -> dict[str, dict[str, Any]]:
    """Kind, range and default of each hyperparameter, by its name; of several with one name also by their conditions."""
    different = {
        (p.name, " and ".join(f"{c.name} in {list(c.values)}" for c in p.conditions)): p for p in parameters
    }
    several = Counter(name for name, _ in different)
    return {
        f"{name} if {conditions}" if several[name] > 1 else name: {"kind": type(p).__name__, **p.get_config()}
        for (name, conditions), p in different.items()
    }


def load(dataset: DatasetOrLoader) -> Dataset:
    """The data set, or what the function returns; (images, labels) become one. Raises ConfigError where it is neither."""
    return datasets.as_dataset(dataset() if callable(dataset) else dataset)


def make_search_oracle(
    description: dict[str, Any], hp: kt.HyperParameters, options: Options
) -> oracle.SearchOracle:
    """The oracle of a search.

    Args:
        description: what is searched, from `describe_search`.
        hp: the hyperparameters, from `describe_search`.
        options: the options of the search.

    Returns:
        A new oracle. Its `reload` restores the state of an earlier process.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    return oracle.make_oracle(
        options.tuner,
        epochs=description["defaults"]["epochs"],
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
    """A KerasTuner tuner whose trials are ordinary runs, each in a run folder of its own.

    Args:
        search_oracle: chooses the hyperparameters of each trial. The tuner refuses trials with another digest than the
            oracle's, and a worker sends six heartbeats in the oracle's lease.
        space: hyperparameters -> Config.
        dataset: the images to train on.
        folder: the folder of the trials' run folders.
        show_epochs: whether to show the epochs of a trial on the terminal.
        verbose: 1: print a line when a trial begins; 0: print nothing.
    """

    def __init__(
        self,
        search_oracle: oracle.SearchOracle,
        space: SpaceFunction,
        dataset: Dataset,
        folder: Path,
        *,
        show_epochs: bool = False,
        verbose: int = 0,
    ):
        super().__init__(search_oracle, space, directory=str(folder.parent), project_name=folder.name)
        self.space, self.dataset, self.show_epochs = space, dataset, show_epochs
        self._folder = SearchFolder(folder.parent)
        self._digest, self._lease = search_oracle.search, search_oracle.lease
        self._idle, self.verbose = False, verbose
        self.signals = runtime.Signals()

    def save(self) -> None:
        """Saves the oracle's state, which is all that there is to save. A worker has none."""
        if isinstance(self.oracle, kt.Oracle):
            self.oracle.save()

    def pre_create_trial(self) -> None:
        """Waits a second if the last request returned no trial."""
        if self._idle:
            time.sleep(1)
        self._idle = True

    def on_trial_begin(self, trial: Trial) -> None:
        """Prints the number of the trial, counted from 1, if verbose."""
        self._idle = False
        if self.verbose:
            print(f"trial {int(trial.trial_id) + 1}: training")

    def run_trial(self, trial: Trial) -> dict[str, float]:
        """Trains a trial. An error of the trial is recorded in its values, and the search continues.

        Args:
            trial: the trial, with its hyperparameters.

        Returns:
            The metrics (leaderboard.METRICS). For a failed trial: the objective with the value 0, which is not used.

        Raises:
            errors.FatalError: if the trial belongs to another search, if a signal stopped it, or if nothing can be written.
        """
        values = trial.hyperparameters.values
        if values.get(oracle.SEARCH) != self._digest:
            raise errors.FatalError(
                "the chief runs another search; start the worker with the flags of the chief"
            )
        folder = Path(self.get_trial_dir(trial.trial_id))
        try:
            self._check_signals()  # one may have arrived after the last step of the trial before
            config = make_config(self.space, trial.hyperparameters, self.dataset)
            gc.collect()  # the parts of the model of the trial before refer to one another
            with self._heartbeats(trial.trial_id), count_starts(folder):
                while True:
                    # No heartbeat came from the worker that had this trial, but a locked folder shows that it lives: let it finish.
                    with contextlib.suppress(FolderBusyError):
                        return self._scored(self._train(config, folder))
                    time.sleep(1)
                    self._check_signals()
        except (RunInterrupted, WriteError) as error:  # no fault of the trial, which the search resumes
            raise errors.FatalError(str(error)) from error
        except Exception as error:
            # KerasTuner would print the traceback of an exception. The oracle reads the reason instead.
            values[oracle.FAILURE] = _reason(error)
            return {self.oracle.objective.name: 0.0}

    def _check_signals(self) -> None:
        if self.signals.caught:
            raise RunInterrupted(f"stopped by {self.signals.caught}")

    def _scored(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics. Raises RunError where the objective is no number: KerasTuner would train the trial again."""
        name = self.oracle.objective.name
        if not math.isfinite(metrics[name]):
            raise RunError(f"its {name} is {metrics[name]}")
        return metrics

    def _train(self, config: Config, folder: Path) -> dict[str, float]:
        """Trains `config` in `folder`, or resumes the run of a process that died. Returns the metrics of the trial."""
        run = RunFolder(folder)
        saved = run.read_config() if run.has_run() else None
        stale = saved is not None and (
            Config.from_record(saved) != config
            or saved.get("fingerprint") != datasets.fingerprint(self.dataset)
        )
        seconds_before = 0.0
        if run.history_file.exists() and not stale:
            with contextlib.suppress(RunError):  # a power failure may leave it empty; the run writes it again
                seconds_before = sum(row["seconds"] for row in run.read_history())
        start = time.monotonic()
        # A process may have finished the run, and died before it reported the metrics.
        if saved is not None and run.is_finished() and not stale:
            metrics = run.read_metrics()
        else:
            try:
                metrics = self._trained(config, folder, overwrite=stale)
            except ConfigError:
                if stale or not run.is_finished():
                    raise
                metrics = run.read_metrics()  # the worker that had this trial has just finished it
        kept = next(row for row in run.read_history() if row["epoch"] == metrics["best_epoch"])
        return {
            "val_accuracy": metrics["best_val_accuracy"],
            "val_loss": kept["val_loss"],
            "epochs": min(config.epochs, metrics["epochs"]),
            "parameters": metrics["params"],
            "pflop": metrics["pflop"],
            "seconds": seconds_before + time.monotonic() - start,
        }

    def _trained(self, config: Config, folder: Path, *, overwrite: bool) -> dict[str, Any]:
        """Trains `config` in `folder`, and returns the contents of metrics.json."""
        with runtime.auto_precision(self._precision(config)):
            return train_and_evaluate(
                config,
                folder,
                dataset=self.dataset,
                overwrite=overwrite,
                callbacks=[EpochLine(config.epochs)] if self.show_epochs else (),
                verbose=0,
                full_report=False,
                score_test=False,
                allow_replica_change=True,  # another worker may have more GPUs
            )

    def _precision(self, config: Config) -> str | None:
        """What "auto" means in all trials, also those of other machines; None where the config has another precision."""
        if config.precision != "auto":
            return None
        runtime.choose_strategy(config.strategy)  # before TensorFlow's devices are used
        depthwise = preparation.has_depthwise(config)
        return self._folder.precision(lambda: runtime.choose_precision("auto", depthwise=depthwise)[0])

    @contextlib.contextmanager
    def _heartbeats(self, trial_id: str) -> Iterator[None]:
        """Sends the chief a heartbeat of this trial six times per lease. Without a chief: does nothing."""
        if isinstance(self.oracle, kt.Oracle):
            yield
            return
        ended = threading.Event()

        def send() -> None:
            while not ended.wait(self._lease / 6):
                # whether the chief stays away is seen at the end of the trial
                with contextlib.suppress(errors.FatalError):
                    self.oracle.get_trial(trial_id)

        threading.Thread(target=send, daemon=True).start()
        try:
            yield
        finally:
            ended.set()


class EpochLine(keras.callbacks.Callback):
    """Shows the last epoch of a trial in one line of the terminal, and clears the line at the end.

    Args:
        epochs: the number of epochs of the trial.
    """

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
    """Counts, in the file "starts", how often the process of a trial has died inside this context without progress.

    A user may end a search by SIGKILL several times, so the limit is high. If memory runs out, Linux ends the process
    and counts that, so the limit is low.

    Args:
        folder: the trial's run folder.

    Raises:
        RunError: if the trial has reached MAX_STARTS, or MAX_OUT_OF_MEMORY_STARTS and memory has run out since.
    """
    file, state = folder / "starts", RunFolder(folder).state_file
    starts, kills_before = 0, _oom_kills()
    progress = state.stat().st_mtime_ns if state.exists() else 0  # another number means another state
    if file.exists():
        with contextlib.suppress(ValueError):  # a power failure may leave it empty
            starts_before, kills, *then = map(int, file.read_text().split())
            if then in ([], [progress]):  # version 1.0.0 wrote two numbers
                starts, kills_before = starts_before, kills
    if starts >= MAX_STARTS:
        raise RunError(f"its process died {starts} times, for an unknown reason")
    if starts >= MAX_OUT_OF_MEMORY_STARTS and _oom_kills() > kills_before:
        raise RunError(
            f"out of memory: the system ended its process {starts} times; use a smaller batch_size"
        )
    files.write_atomic(file, f"{starts + 1} {kills_before} {progress}")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        files.remove_leftovers(folder, [file.name])


def _oom_kills() -> int:
    """How many processes Linux has ended since it started because memory ran out; 0 on other systems."""
    try:
        return int(Path("/proc/vmstat").read_text().split("oom_kill ")[1].split()[0])
    except (OSError, IndexError):
        return 0


def _reason(error: Exception) -> str:
    """Why a trial failed, in one line of at most 300 characters and the name of the error."""
    if isinstance(error, tf.errors.ResourceExhaustedError | MemoryError):
        error = runtime.out_of_memory(error if str(error) else MemoryError("no memory"))
    text = one_line(error, 300)
    return text if isinstance(error, ConfigError | RunError) else f"{type(error).__name__}: {text}"
