"""The training loop: epochs, validation, callbacks, the best model, the clock, and saving for an exact resume."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from . import runtime
from .config import PRECISIONS
from .engine import Engine, RunningMetrics
from .errors import ConfigError, RunError, RunInterrupted, interrupted
from .files import parse_json
from .hooks import Hooks
from .run_folder import RunFolder

# What Keras's EarlyStopping and ReduceLROnPlateau learn. Their other attributes are settings; they are not kept, because
# EarlyStopping changes the sign of its own `min_delta`.
CALLBACK_STATE = ("best", "best_epoch", "wait", "stopped_epoch", "cooldown_counter")
RECIPE_MODEL = "of the config"
SAVE_SECONDS = 60.0  # the most training, in seconds, that a killed process loses
# The most time that saving takes, relative to training: on a slow disk more training may be lost.
SAVE_SHARE = 1 / 3
UNLIKE_CHANGES = (
    "callbacks have set another learning rate, or other weights, on this worker than on others; allowed: the same callbacks on"
    " all workers, which decide by the same values"
)
# that one call of the graph should take: between calls, progress is shown and signals are handled
CALL_SECONDS = 0.5


class EpochLines(keras.callbacks.Callback):
    """Prints one plain line per epoch: what a log file or a pipe should get instead of a progress bar."""

    def __init__(self, epochs: int):
        super().__init__()
        self._epochs, self._began = epochs, 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        shown = {
            name: f"{value:.3g}" if "rate" in name else f"{value:.4f}" for name, value in (logs or {}).items()
        }
        values = "  ".join(f"{name} {shown[name]}" for name in sorted(shown))
        print(
            f"epoch {epoch + 1}/{self._epochs}  {values}  {time.monotonic() - self._began:.1f} s", flush=True
        )


def saved_precision(arrays: Mapping[str, np.ndarray] | None) -> str | None:
    """The dtype policy of the run that `TrainingLoop.save` wrote; None without one, or where `restore` will refuse it."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        policy = None if arrays is None else parse_json(str(arrays["meta"]))["environment"]["precision"]
        return policy if policy in PRECISIONS and policy != "auto" else None
    return None


class TrainingLoop:
    """Trains an engine from where it stands to its end, and keeps the run folder up to date.

    Args:
        engine: what trains.
        folder: the run folder.
        fingerprint: of the data set; see `datasets.fingerprint`.
        chief: whether this process writes the run's files.
        callbacks: further Keras callbacks, from `hooks.check_callbacks`.
        verbose: 0: nothing; 1: a progress bar; 2: one line per epoch.
        full_report: whether to write TensorBoard logs.
        since: when this process's part of the run began, as from `time.monotonic()`.
        save_seconds: the most seconds of training that a killed process loses; more where a save takes over a quarter of it.
        model_digest: of somebody's own model; None: the model is that of the config.
        overwrite: whether the command asked to replace an earlier run; only for the message of an interruption.
    """

    def __init__(
        self,
        engine: Engine,
        folder: RunFolder,
        fingerprint: str,
        *,
        chief: bool,
        callbacks: Sequence[keras.callbacks.Callback],
        verbose: int,
        full_report: bool,
        since: float,
        overwrite: bool,
        save_seconds: float = SAVE_SECONDS,
        model_digest: str | None = None,
    ):
        self.engine, self.config, self.folder = engine, engine.config, folder
        self.fingerprint, self.chief, self.full_report = fingerprint, chief, full_report
        self.overwrite, self.model_digest = overwrite, model_digest
        self.history: list[dict[str, Any]] = []
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.target: tuple[int, float] | None = None  # the epoch and the seconds at which it was reached
        self.images, self.step_seconds = 0, 0.0
        self._saved_callbacks: list[dict[str, Any]] = []  # CALLBACK_STATE of each, from before this process
        self._since, self._save_seconds = since, save_seconds
        # When the loop began in this process; when the state was taken that was saved last, and its step.
        self._began = self._saved = time.monotonic()
        self._saved_step = engine.step
        self._call_cost = self._validation_cost = self._save_cost = 0.0  # seconds that the last one took
        self._before = {"seconds": 0.0, "elapsed": 0.0, "epoch_seconds": 0.0}  # of earlier processes
        self._epoch_began = 0.0
        # The epoch, from 0, whose `on_epoch_begin` was called last, by any process.
        self._begun: int | None = None
        self._all_stop = False  # whether a callback of any worker has asked to stop
        self._recipe_callbacks = self._make_callbacks()
        self._last_logs: dict[str, float] | None = None  # of the last epoch
        self.hooks = Hooks(
            engine,
            self._recipe_callbacks,
            callbacks,
            shown=[EpochLines(self.epochs)] if chief and verbose == 2 else [],
            epochs=self.epochs,
            verbose=verbose if chief else 0,
            progress_bar=chief and verbose == 1,
        )

    def metrics(self) -> dict[str, Any]:
        """The part of metrics.json that the loop knows."""
        epoch, seconds = self.target or (None, None)
        return {
            "epochs": self.history[-1]["epoch"],
            "best_epoch": self.best_epoch,
            "best_val_accuracy": self.best,
            "target": self.config.target,
            "epoch_at_target": epoch,
            "seconds_to_target": seconds and round(seconds, 2),
            "train_seconds": round(self.seconds(), 2),
            "images_per_second": round(self.images / self.step_seconds, 1) if self.step_seconds else None,
        }

    @property
    def epochs(self) -> int:
        """Epochs of the run, a last one that is cut short included."""
        return -(-self.engine.steps // self.engine.steps_per_epoch)

    def _make_callbacks(self) -> list[keras.callbacks.Callback]:
        c, found = self.config, []
        if c.early_stopping is not None:
            found.append(keras.callbacks.EarlyStopping(monitor="val_loss", patience=c.early_stopping))
        if c.schedule.name == "plateau":
            found.append(
                keras.callbacks.ReduceLROnPlateau(
                    monitor="val_loss",
                    factor=c.schedule.drop,
                    patience=c.schedule.patience,
                    min_lr=c.schedule.end * c.optimizer.learning_rate,
                )
            )
        if self.chief and self.full_report:
            found.append(keras.callbacks.TensorBoard(self.folder.tensorboard, write_graph=False))
        return found

    def seconds(self) -> float:
        """Seconds in the loop, over all processes of this run: training, validation, saving."""
        return self._before["seconds"] + time.monotonic() - self._began

    def elapsed(self) -> float:
        """Seconds in this run, over all its processes, each from its very start, imports included."""
        return self._before["elapsed"] + time.monotonic() - self._since

    # -- training ------------------------------------------------------------------------------------------------

    def run(self, validation: Sequence[np.ndarray], signals: runtime.Signals) -> None:
        """Trains to the end of the run, or until a callback or a signal stops it.

        Args:
            validation: images uint8 [n, height, width, channels] and labels [n]; n may be 0.
            signals: what catches SIGINT, SIGTERM and SIGHUP.

        Raises:
            RunInterrupted: after a signal, with everything saved.
            RunError: for what failed.
        """
        engine, per_epoch = self.engine, self.engine.steps_per_epoch
        each_step = self._agree_on_calls()
        count = 1
        self._began = self._saved = time.monotonic()
        self._saved_step = engine.step
        if self.chief and self.history:
            # It may have lost rows, or have some that came after the state.
            self.folder.write_history(self.history)
        self._all_stop = self._wants_stop()  # before an interruption
        self._begin("on_train_begin", again=engine.step > 0 or self._begun is not None)
        # Keras's callbacks forget in on_train_begin.
        for callback, state in zip(self._recipe_callbacks, self._saved_callbacks, strict=False):
            vars(callback).update(state)
        # An interruption may have come between the stop and the end of its epoch.
        while engine.step < engine.steps and (not self._all_stop or self._is_within_epoch()):
            epoch = engine.step // per_epoch
            end = min((epoch + 1) * per_epoch, engine.steps)
            self._epoch_began = time.monotonic() - self._before["epoch_seconds"]
            self._before["epoch_seconds"] = 0.0
            self._begin("on_epoch_begin", epoch, again=self._begun == epoch)
            self._begun = epoch
            while engine.step < end:
                # All workers of a cluster take as many steps a call, and stop together.
                changes = self.hooks.changes()
                wanted, caught, stopped, *mean_changes = runtime.mean_over_workers(
                    engine.strategy, count, bool(signals.caught), self._wants_stop(), *changes
                )
                self._all_stop = bool(stopped)
                # Workers that differ would average the gradients of different networks.
                if not np.allclose(mean_changes, changes, rtol=1e-4, atol=0, equal_nan=True):
                    raise RunError(UNLIKE_CHANGES)
                if caught:
                    self._stop(signals.caught or "a signal to another worker")
                if self._all_stop and self._is_within_epoch():
                    break  # as in `Model.fit`, the epoch still ends with a validation
                steps = 1 if each_step else min(int(wanted), end - engine.step)
                # Not after the last step of an epoch: its validation belongs to it.
                self._save_if_due(self._call_cost + self._validation_cost * (engine.step + steps == end))
                count = self._train_steps(steps, int(wanted), epoch)
            self._agree_to_stop()
            self._end_epoch(epoch, validation, last=self._all_stop or engine.step >= engine.steps)
            self._agree_to_stop()
        self._finish(validation, signals)

    def _finish(self, validation: Sequence[np.ndarray], signals: runtime.Signals) -> None:
        """What follows the last epoch, until model and state are saved. Raises RunInterrupted after a signal."""
        self._validate_last(validation)
        self.hooks.call("on_train_end", self._last_logs, last=True)
        if self.best_epoch is None:
            self.best_epoch, self.best = self.history[-1]["epoch"], self.history[-1]["val_accuracy"]
            self._save_model()
        if self.chief:
            self.save()  # what comes now may be interrupted, too, and the training be kept
        # No worker continues before the chief has saved the model.
        (caught,) = runtime.mean_over_workers(self.engine.strategy, bool(signals.caught))
        if caught:
            raise self._interrupted(signals.caught or "a signal to another worker")

    def _train_steps(self, steps: int, wanted: int, epoch: int) -> int:
        """Takes up to `steps` steps in one call; the number for the next call.

        As many steps a call as fit CALL_SECONDS, at most twice the `wanted` of this call: the results do not depend on it.
        """
        engine, before, start = self.engine, self.engine.step, time.perf_counter()
        first = epoch * engine.steps_per_epoch
        self.hooks.call("on_train_batch_begin", before - first)
        logs = engine.train(steps)
        self.hooks.call("on_train_batch_end", engine.step - 1 - first, logs)
        done, spent = engine.step - before, time.perf_counter() - start
        self.images += done * self.config.batch_size
        self.step_seconds += spent
        self._call_cost = spent
        return int(np.clip(CALL_SECONDS / (spent / done), 1, min(2 * wanted, 1024)))

    def _begin(self, hook: str, *arguments: Any, again: bool) -> None:
        """Calls a hook that begins something.

        again: the run resumes and calls it for the second time. The saved state already has what the first call changed in
            rate and weights, so changes are undone.
        """
        optimizer = self.engine.optimizer
        rate = float(np.asarray(optimizer.learning_rate))
        self.hooks.call(hook, *arguments, last=again)
        if again and float(np.asarray(optimizer.learning_rate)) != rate:
            optimizer.learning_rate = rate
        if again:
            self.engine.export()  # where no step is left, the model is saved as it is

    def _agree_on_calls(self) -> bool:
        """Finds what the callbacks of any worker need, because all workers must make the same calls of the graph.

        Returns whether a call is one step. Raises RunError where the workers are at different steps.
        """
        engine, hooks = self.engine, self.hooks
        wishes = hooks.each_step, hooks.on_test_batch is not None
        step, each_step, each_test_batch = runtime.mean_over_workers(engine.strategy, engine.step, *wishes)
        if step != engine.step:
            raise RunError(
                f"this worker is at step {engine.step}, others are not; resume with a --workdir that all share"
            )
        if each_test_batch and hooks.on_test_batch is None:
            hooks.on_test_batch = lambda batch, logs: None
        return bool(each_step)

    def _agree_to_stop(self) -> None:
        """Finds whether a callback of any worker has asked to stop. All workers wait here for one another."""
        (stopped,) = runtime.mean_over_workers(self.engine.strategy, self._wants_stop())
        self._all_stop = bool(stopped)

    def _is_within_epoch(self) -> bool:
        """Whether steps were taken since the last epoch ended, which a stop may have cut short."""
        return len(self.history) * self.engine.steps_per_epoch < self.engine.step

    def _wants_stop(self) -> bool:
        """Whether a callback of this process has asked to stop."""
        return bool(self.hooks.model.stop_training)

    def _end_epoch(self, epoch: int, validation: Sequence[np.ndarray], *, last: bool) -> None:
        """Validates, where it is due or the epoch is the last one, and keeps history, best model and state."""
        if self.chief:
            self.folder.check_there()
        engine, logs = self.engine, self.engine.running.logs()
        rate = float(np.asarray(engine.optimizer.learning_rate))
        if len(validation[0]) and (last or (epoch + 1) % self.config.validation_interval == 0):
            logs.update(self._validate(validation))
        row = {
            "epoch": epoch + 1,
            **{k: logs.get(k) for k in ("loss", "accuracy", "val_loss", "val_accuracy")},
        }
        seconds = round(time.monotonic() - self._epoch_began, 3)
        self.history.append({**row, "learning_rate": rate, "seconds": seconds})
        engine.export()
        self._keep_best()
        self._last_logs = {**logs, "learning_rate": rate}
        self.hooks.call("on_epoch_end", epoch, self._last_logs)
        engine.running = RunningMetrics()
        if self.chief:
            self.folder.write_history(self.history)
            if not (last or self._wants_stop()):
                self._save_if_due(self._call_cost)

    def _validate(self, validation: Sequence[np.ndarray]) -> dict[str, float]:
        """Returns "val_loss" and "val_accuracy" (0-1) of now."""
        self.hooks.call("on_test_begin")
        began = time.monotonic()
        images, labels = validation
        scores = self.engine.evaluate(images, labels, self.hooks.on_test_batch)
        self._validation_cost = time.monotonic() - began
        self.hooks.call("on_test_end", scores)
        return {f"val_{name}": value for name, value in scores.items()}

    def _validate_last(self, validation: Sequence[np.ndarray]) -> None:
        """Validates the last epoch where that was not due, and a callback then ended the run in `on_epoch_end`."""
        last = self.history[-1]
        if len(validation[0]) == 0 or last["val_accuracy"] is not None:
            return
        scores = self._validate(validation)
        last.update(scores)
        self._last_logs = {**(self._last_logs or {}), **scores}
        self.engine.export()
        self._keep_best()
        if self.chief:
            self.folder.write_history(self.history)

    def _keep_best(self) -> None:
        """Saves the model if the last epoch is the best one so far, and notes the first one that reaches the target."""
        last = self.history[-1]
        if last["val_accuracy"] is None:
            return
        if self._is_best(last):
            self.best, self.best_epoch = last["val_accuracy"], last["epoch"]
            self._save_model()
        if self.target is None and last["val_accuracy"] >= self.config.target:
            self.target = (last["epoch"], self.elapsed())

    def _is_best(self, row: dict[str, Any]) -> bool:
        """Whether an epoch is the best one so far: by validation accuracy, then by validation loss.

        Of few validation images many epochs get all right, and the first of them has often learned least.
        """
        if self.best is None:
            return True
        (best,) = (r for r in self.history if r["epoch"] == self.best_epoch)
        return (row["val_accuracy"], -row["val_loss"]) > (best["val_accuracy"], -best["val_loss"])

    def _stop(self, by: str) -> None:
        """Saves everything, and raises RunInterrupted."""
        if self.best_epoch is None:
            self.engine.export()
            self._save_model()
        if self.chief:
            self.save()
        # Not sooner: a callback may fail, or set weights, as the best ones, from which the run must not resume.
        self.hooks.call("on_train_end", self._last_logs, last=True)
        runtime.mean_over_workers(self.engine.strategy, 0)  # no worker leaves, or resumes, before that
        raise self._interrupted(by)

    def _interrupted(self, by: str) -> RunInterrupted:
        how = f"stopped by {by} at step {self.engine.step:,} of {self.engine.steps:,}"
        return interrupted(how, self.folder, self.overwrite, chief=self.chief)

    def _save_model(self) -> None:
        if self.chief:
            self.folder.save_model(self.engine.model)

    # -- resuming ------------------------------------------------------------------------------------------------

    def _save_if_due(self, ahead: float) -> None:
        """Saves, unless there will be time for that after what comes next. ahead: the seconds that it takes."""
        unsaved = time.monotonic() - self._saved
        due = unsaved + ahead + self._save_cost >= self._save_seconds
        if self._save_seconds:  # 0 asks for a save after every call
            due = due and unsaved * SAVE_SHARE >= self._save_cost
        if self.chief and due and self.engine.step != self._saved_step:
            self.save()

    def save(self) -> None:
        """Saves all that the rest of the run depends on: variables, step, callbacks, history."""
        began = time.monotonic()
        in_epoch = self.engine.step % self.engine.steps_per_epoch
        meta = {
            "data": self.fingerprint,
            "environment": self._environment(),
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_model": self.folder.model_digest(),
            "target": self.target,
            "images": self.images,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds(),
            "elapsed": self.elapsed(),
            "epoch_seconds": time.monotonic() - self._epoch_began if in_epoch else 0.0,
            "stopped": self._all_stop or self._wants_stop(),
            "begun": self._begun,
            "callbacks": [
                {k: v for k, v in vars(c).items() if k in CALLBACK_STATE} for c in self._recipe_callbacks
            ],
        }
        arrays = {"meta": np.array(json.dumps(meta)), **self.engine.state()}
        self.folder.write_state(self.config, arrays)
        self._saved, self._saved_step = began, self.engine.step
        self._save_cost = time.monotonic() - began

    def restore(
        self, arrays: dict[str, np.ndarray], allow_replica_change: bool, model_digest: str | None
    ) -> str:
        """Takes up what `save` wrote.

        Args:
            arrays: of `save`.
            allow_replica_change: whether the run may have had another number of replicas.
            model_digest: of model.keras in the chief's folder; None where there is none.

        Returns:
            What another number of replicas changes, for people; empty where it is the same.
        Raises:
            ConfigError: where the run had other data, precision or replicas, or its best model is gone.
            RunError: on a damaged state.
        """
        try:
            meta = parse_json(str(arrays["meta"]))
            now = self._environment()
            before = {"model": RECIPE_MODEL, **meta["environment"]}  # version 1.0.0 knew no other models
            data, before = meta["data"], {name: before[name] for name in now}
            self.history, self.best, self.best_epoch = meta["history"], meta["best"], meta["best_epoch"]
            best_model = meta.get("best_model")  # version 1.0.0 did not save it
            self.target = meta["target"] and tuple(meta["target"])
            self.images, self.step_seconds = meta["images"], meta["step_seconds"]
            self._before = {name: meta[name] for name in self._before}
            self.hooks.model.stop_training = meta["stopped"]
            self._saved_callbacks = meta["callbacks"]
            self._begun = meta.get("begun")  # version 1.0.0 did not save it
        except (KeyError, ValueError, TypeError) as error:
            raise self.folder.damaged_state(error) from error
        unfinished = f"{self.folder} holds an unfinished run"
        instead = "choose another --workdir, or replace it with --overwrite"
        if data != self.fingerprint:
            raise ConfigError(f"{unfinished} on other images; {instead}, or give it its own images")
        for name, was in before.items():
            if was != now[name] and not (name == "replicas" and allow_replica_change):
                how = ", or allow it with --allow_replica_change" if name == "replicas" else ""
                had = f"with {name} {was}, now {now[name]}"
                raise ConfigError(f"{unfinished} {had}; {instead}, or give it what it had{how}")
        if self.best_epoch is not None and model_digest is None:
            lost = f"without model.keras, its model of epoch {self.best_epoch}"
            raise ConfigError(f"{unfinished} {lost}; {instead}, or put the file back")
        try:
            self.engine.restore(arrays)
        except (KeyError, ValueError) as error:
            raise self.folder.damaged_state(error) from error
        self.engine.export()
        if best_model not in (None, model_digest):
            # The process died between a new best model and its state. The epochs that are trained again may, on another
            # number of replicas, not be as good, and then the file would be of none of them.
            self.best = self.best_epoch = None
        if self.history:
            ended = self.history[-1].items()
            self._last_logs = {k: v for k, v in ended if v is not None and k not in ("epoch", "seconds")}
        return "" if before["replicas"] == self.engine.replicas else self._replica_change(before["replicas"])

    def _replica_change(self, before: int) -> str:
        """What it changes that the run had another number of replicas."""
        config, now = self.config, self.engine.replicas
        size = config.batch_size // now
        changes = ["sums round otherwise"]
        if not config.synchronize_batch_norm:
            changes.append(
                f"batch norm takes its statistics over {size:,} images, not {config.batch_size // before:,}"
            )
        if config.augmentation.mixes:
            changes.append("other images are mixed with one another")
        if any(
            isinstance(layer, keras.layers.Dropout) for layer in self.engine.training_model._flatten_layers()
        ):
            changes.append("dropout draws for a replica, not for the whole batch")
        return (
            f"; {now} replica(s), {before} before: {size:,} images each, of {config.batch_size:,} in a step as before;"
            f" {', '.join(changes)}, so the result is no longer that of an unchanged run to the bit"
        )

    def _environment(self) -> dict[str, str | int]:
        """What "auto" and the machine decide, and results depend on."""
        return {
            "precision": self.engine.policy,
            "replicas": self.engine.replicas,
            "model": self.model_digest or RECIPE_MODEL,
        }
