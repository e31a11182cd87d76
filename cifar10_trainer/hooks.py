"""The Keras callbacks of a run: their hooks, as `Model.fit` calls them, and the model that they see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from . import optim
from .config import Config
from .engine import Engine
from .errors import ConfigError, shown

HOOKS = tuple(
    f"on_{part}_{moment}"
    for part in ("train", "epoch", "train_batch", "test", "test_batch")
    for moment in ("begin", "end")
)
# Keras callbacks that a run cannot serve, and why.
REFUSED: dict[type, str] = {
    keras.callbacks.BackupAndRestore: "a run saves its own state, and the same call resumes it exactly",
    keras.callbacks.SwapEMAWeights: "no optimizer here keeps an EMA (use_ema); Config has `averaging`",
}
SET_THE_RATE = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)
ALLOWED = "allowed: a keras.callbacks.Callback object, or a list of them"


def check_callbacks(callbacks: Any, config: Config) -> list[keras.callbacks.Callback]:
    """Returns callbacks as a list.

    Args:
        callbacks: what a user gave: one callback, a `CallbackList`, a list of callbacks, nested or not, or None.
        config: of the run.

    Raises:
        ConfigError: if something is not a callback, or cannot do its work in this run.
    """
    if callbacks is None:
        return []
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return check_callbacks(callbacks.callbacks, config)
    is_callback = isinstance(callbacks, keras.callbacks.Callback)
    if isinstance(callbacks, type | str | bytes) or not (is_callback or isinstance(callbacks, Iterable)):
        raise ConfigError(f"callbacks has {shown(callbacks)}; {ALLOWED}")
    if not is_callback:
        return [found for item in callbacks for found in check_callbacks(item, config)]
    name = type(callbacks).__name__
    for kind, reason in REFUSED.items():
        if isinstance(callbacks, kind):
            raise ConfigError(f"callbacks has {name}, but {reason}; allowed: leave it out")
    if isinstance(callbacks, SET_THE_RATE) and not optim.is_constant(config.schedule):
        raise ConfigError(_rate_is_taken(f"callbacks has {name}", config))
    return [callbacks]


def _rate_is_taken(what: str, config: Config) -> str:
    s = config.schedule
    return (
        f"{what}, but the schedule {s.name}{' with warmup' if s.warmup else ''} sets the learning rate; allowed: with"
        " Schedule(name='constant')"
    )


class Hooks:
    """Calls the hooks of a run's callbacks.

    The callbacks share one model, of the layers of the plain model. Hooks that a callback of the user overrides find the
    weights of that moment in it, and what they set there takes effect in the training. The other hooks cost nothing.

    Args:
        engine: what trains.
        recipe: the run's own callbacks, which neither read nor set weights.
        users: further callbacks, from `check_callbacks`.
        shown: callbacks of the run that print, after all others.
        epochs: of the run.
        verbose: 0, 1 or 2, for `params`.
        progress_bar: whether to add Keras's.

    Attributes:
        model: what the callbacks see as `self.model`.
        each_step: whether a hook needs to be called at every step.
        on_test_batch: what `Engine.evaluate` calls before and after a batch; None: no hook needs to be called there.
    """

    def __init__(
        self,
        engine: Engine,
        recipe: Sequence[keras.callbacks.Callback],
        users: Sequence[keras.callbacks.Callback],
        *,
        shown: Sequence[keras.callbacks.Callback] = (),
        epochs: int,
        verbose: int,
        progress_bar: bool,
    ) -> None:
        self.engine = engine
        self.model = _callback_model(engine, compiled=bool(users))
        self._used = {hook for callback in users for hook in HOOKS if _uses(callback, hook)}
        self.each_step = bool(self._used & {"on_train_batch_begin", "on_train_batch_end"})
        of_batches = self._used & {"on_test_batch_begin", "on_test_batch_end"}
        self.on_test_batch = self._call_test_batch if of_batches else None
        # how often hooks have changed the weights, and the sum of their magnitudes after the last time
        self._changes = (0.0, 0.0)
        self._weights: list[np.ndarray] = []  # those in the model at the step `_step`
        self._step = -1
        self._list = keras.callbacks.CallbackList(
            [*recipe, *users, *shown],
            add_history=True,
            add_progbar=progress_bar,
            model=self.model,
            epochs=epochs,
            steps=engine.steps_per_epoch,
            verbose=verbose,
        )

    def call(self, hook: str, *arguments: Any, last: bool = False) -> None:
        """Calls a hook of all callbacks.

        Args:
            hook: its name.
            arguments: of the hook.
            last: whether weights that callbacks set now go into the model alone, and not into the training.

        Raises:
            ConfigError: if a callback sets the learning rate, but the config has a schedule.
        """
        used = hook in self._used
        if used and self._step != self.engine.step:
            self._weights = self.engine.training_model.get_weights()
            self.engine.model.set_weights(self._weights)
            self._step = self.engine.step
        try:
            getattr(self._list, hook)(*arguments)
        except TypeError as error:
            if "LearningRateSchedule" not in str(error):
                raise
            what = f"a callback sets the learning rate in {hook}"
            raise ConfigError(_rate_is_taken(what, self.engine.config)) from error
        if used and last:
            self._step = -1  # the model may hold other weights than the training now
        elif used:
            self._take_weights()

    def _call_test_batch(self, batch: int, logs: dict[str, float] | None) -> None:
        self.call("on_test_batch_begin" if logs is None else "on_test_batch_end", batch, logs)

    def _take_weights(self) -> None:
        """Takes over what a callback has changed in the model's weights."""
        weights = self.engine.model.get_weights()
        if not all(np.array_equal(a, b) for a, b in zip(weights, self._weights, strict=True)):
            self.engine.set_weights(weights)
            self._weights = weights
            self._changes = self._changes[0] + 1, sum(float(np.abs(w).sum()) for w in weights)

    def changes(self) -> tuple[float, ...]:
        """What callbacks have changed in rate and weights, as numbers that are about the same on all workers of a cluster."""
        rate = self.engine.optimizer.learning_rate if optim.is_constant(self.engine.config.schedule) else 0.0
        return float(np.asarray(rate)), *self._changes


def _callback_model(engine: Engine, *, compiled: bool) -> keras.Model:
    """The model that callbacks see. It shares the layers of the plain model, which stays uncompiled."""
    model = keras.Model(engine.model.input, engine.model.output, name=engine.model.name)
    if compiled:
        model.compile(engine.optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        # Keras makes the metrics at their first use. Callbacks look at them to find out whether more is better.
        outputs = np.full([1, engine.num_classes], 1 / engine.num_classes, np.float32)
        model.compute_metrics(None, np.zeros(1, np.int32), outputs)
        model.reset_metrics()
    else:
        model.optimizer = engine.optimizer
    # Not into files: they open where neither this package nor its optimizers are known.
    model.get_compile_config = lambda: None
    model.stop_training = False
    return model


def _uses(callback: keras.callbacks.Callback, hook: str) -> bool:
    """Whether a callback overrides a hook. The batch hooks of Keras's own that act once an epoch do not count."""
    if "batch" not in hook:
        return not _is_default(callback, hook)
    kinds = keras.callbacks
    if type(callback) is kinds.ProgbarLogger:
        return False
    if type(callback) is kinds.ModelCheckpoint:
        return hook == "on_train_batch_end" and callback.save_freq != "epoch"
    if type(callback) is kinds.TensorBoard:
        often = callback.update_freq != "epoch" or callback.write_steps_per_second or callback._should_trace
        return bool(often) and not _is_default(callback, hook)
    older = {"on_train_batch_begin": "on_batch_begin", "on_train_batch_end": "on_batch_end"}.get(hook)
    return not _is_default(callback, hook) or bool(older and not _is_default(callback, older))


def _is_default(callback: keras.callbacks.Callback, hook: str) -> bool:
    """Whether a hook is the empty one of Keras's base class."""
    return bool(getattr(getattr(callback, hook), "_is_default", False))
