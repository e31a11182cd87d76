"""What Keras, TensorFlow and Python keep for a whole process, and no result may depend on.

`keras_defaults` replaces a user's settings for the time of a call and restores them. `seeded` and `global_seeds` are for random
numbers, `only_run` lets one run at a time train in a process. Importing this module imports neither Keras nor TensorFlow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .files import expanded, parse_json

if TYPE_CHECKING:
    import tensorflow as tf

BACKEND = "tensorflow"
# Settings of the process: the names of the functions of `keras.config` that read and write each, and Keras's own default.
PROCESS_SETTINGS: tuple[tuple[str, str, Any], ...] = (
    ("floatx", "set_floatx", "float32"),
    ("epsilon", "set_epsilon", 1e-7),
    ("image_data_format", "set_image_data_format", "channels_last"),
    ("max_epochs", "set_max_epochs", None),
    ("max_steps_per_epoch", "set_max_steps_per_epoch", None),
)
# Settings that Keras keeps for each thread. Where a value is None, Keras decides: the policy is then that of floatx.
THREAD_SETTINGS: dict[str, Any] = {"dtype_policy": None, "flash_attention": None}
# No result depends on them, but `clear_session` forgets them.
FORGOTTEN_SETTINGS = ("interactive_logging", "traceback_filtering")
WAIT_SECONDS = 5.0  # for another run, until a message says so

_lock = threading.Lock()
_restore = contextlib.ExitStack()  # gives the process the settings of its user back when it is closed
_inside = 0  # how many calls need the defaults of the process now
_train_lock = threading.Lock()
_trainer: int | None = None  # the thread that holds it


def check_backend() -> None:
    """Checks, without importing Keras, that its backend is TensorFlow.

    Raises:
        ConfigError: if it is another one.
    """
    config = getattr(sys.modules.get("keras"), "config", None)
    if config is not None:
        backend, source = config.backend(), "of Keras, which is imported,"
    elif os.environ.get("KERAS_BACKEND"):
        backend, source = os.environ["KERAS_BACKEND"], "in KERAS_BACKEND"
    else:
        file = keras_home() / "keras.json"
        try:
            backend = parse_json(file.read_text(encoding="utf-8")).get("backend", BACKEND)
        except (OSError, ValueError, AttributeError):  # Keras then takes its defaults, or reports the error
            return
        source = f"in {file}"
    if backend != BACKEND:
        raise ConfigError(
            f"the backend {source} is {str(backend)[:100]!r}; allowed: {BACKEND!r}; set the environment variable"
            f" KERAS_BACKEND={BACKEND} before Keras is imported"
        )


def keras_home() -> Path:
    """The folder where Keras keeps keras.json, data sets and weights, as Keras finds it."""
    if "KERAS_HOME" in os.environ:
        return expanded(os.environ["KERAS_HOME"])
    home = expanded("~")
    return (home if os.access(home, os.W_OK) else Path("/tmp")) / ".keras"


@contextlib.contextmanager
def keras_defaults() -> Iterator[None]:
    """Within the block, or in a function that it decorates, Keras and TensorFlow have their own default settings.

    The user's settings come back at the end, also after an error. Blocks may be nested, and overlap in several threads: the
    settings of the process come back when the last block ends.

    Raises:
        ConfigError: if Keras's backend is not TensorFlow.
    """
    global _inside
    check_backend()
    from keras.src.backend.common import global_state

    names = (*THREAD_SETTINGS, *FORGOTTEN_SETTINGS)
    before = {name: global_state.get_global_attribute(name) for name in names}
    with _lock:
        if not _inside:
            _set_defaults()
        _inside += 1
    try:
        for name, value in THREAD_SETTINGS.items():
            global_state.set_global_attribute(name, value)
        yield
    finally:
        for name, value in before.items():
            global_state.set_global_attribute(name, value)
        with _lock:
            _inside -= 1
            if not _inside:
                _restore.close()


def _set_defaults() -> None:
    """Sets the defaults of the process, for `_restore` to undo."""
    import keras
    import tensorflow as tf

    found: list[tuple[Callable[..., Any], Callable[[], Any], Any]] = [
        (getattr(keras.config, write), getattr(keras.config, read), default)
        for read, write, default in PROCESS_SETTINGS
        if hasattr(keras.config, write)  # the last two came with Keras 3.11
    ]
    found.append((tf.config.run_functions_eagerly, tf.config.functions_run_eagerly, False))
    for write, read, default in found:
        if (before := read()) != default:
            write(default)
            _restore.callback(_set_back, write, read, default, before)
    tf.get_logger().addFilter(_is_no_retracing)
    _restore.callback(tf.get_logger().removeFilter, _is_no_retracing)


def _set_back(write: Callable[..., Any], read: Callable[[], Any], default: Any, before: Any) -> None:
    """Sets a setting to what it was `before`, unless the user has set it meanwhile."""
    if read() == default:
        write(before)


def _is_no_retracing(record: logging.LogRecord) -> bool:
    """A filter for TensorFlow's log, which takes the functions of each run and of each call for new traces of one function."""
    return "tf.function retracing" not in record.getMessage()


class _SeedSource(threading.local):
    """Stands for Python's `random` where Keras draws seeds: a thread may have a generator of its own there."""

    own: random.Random | None = None

    def randint(self, low: int, high: int) -> int:
        return (random if self.own is None else self.own).randint(low, high)


_seed_source = _SeedSource()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block, what Keras draws in this thread follows from `seed`: the seeds of initial weights and of dropout.

    They are those after `keras.utils.set_random_seed(seed)`. But Keras draws from Python's global generator, which all
    threads share: another thread that builds a model would take some of the draws. Here the thread has a generator of
    its own, and the global ones stay as they are.

    Args:
        seed: of the generator, from 0.
    """
    from keras.src.random import seed_generator

    seed_generator.python_random = _seed_source  # outside of these blocks it does what `random` does
    before, _seed_source.own = _seed_source.own, random.Random(seed)
    try:
        yield
    finally:
        _seed_source.own = before


@contextlib.contextmanager
def global_seeds(seed: int) -> Iterator[None]:
    """Within the block, the generators of Python, NumPy, TensorFlow and Keras start at `seed`; then they continue as before.

    For models with layers that draw from them.
    """
    import keras
    import numpy as np
    from keras.src.backend.common import global_state
    from tensorflow.python.eager import context

    names = ("global_random_seed", "global_seed_generator")
    of_keras = {name: global_state.get_global_attribute(name) for name in names}
    of_python, of_numpy = random.getstate(), np.random.get_state()
    tensorflow = context.context()
    of_tensorflow = {name: getattr(tensorflow, name, None) for name in ("_seed", "_rng")}
    keras.utils.set_random_seed(seed)
    global_state.set_global_attribute("global_seed_generator", None)  # Keras 3.12 would continue the old one
    try:
        yield
    finally:
        for name, value in of_keras.items():
            global_state.set_global_attribute(name, value)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        vars(tensorflow).update(of_tensorflow)


class StepSeeds:
    """Stands for Keras's global generator of seeds while a step is traced.

    Keras's own would change a variable that no step returns, and so give each step the same seeds. Here they follow from a seed
    that the step is given, and the step returns the next one.

    Args:
        seed: int64 [2], a seed and a counter, as the state of a `keras.random.SeedGenerator`.

    Attributes:
        seed: the one that the next draw gets.
    """

    def __init__(self, seed: tf.Tensor) -> None:
        self.seed = seed

    def next(self, ordered: bool = True) -> tf.Tensor:
        """Returns a seed that no other call returns."""
        import keras

        seed, self.seed = self.seed, self.seed + keras.ops.cast([0, 1], self.seed.dtype)
        return seed


@contextlib.contextmanager
def drawing_from(generator: StepSeeds) -> Iterator[None]:
    """Within the block, `generator` is Keras's global one, for what draws without a generator of its own."""
    from keras.src.backend.common import global_state

    name = "global_seed_generator"
    before = global_state.get_global_attribute(name)
    global_state.set_global_attribute(name, generator)
    try:
        yield
    finally:
        global_state.set_global_attribute(name, before)


@contextlib.contextmanager
def only_run(log: Callable[[str], None]) -> Iterator[None]:
    """One thread of the process at a time is in such a block; others wait, and `log` it.

    Raises:
        ConfigError: if this thread is in such a block already.
    """
    global _trainer
    if _trainer == threading.get_ident():
        raise ConfigError(
            "train is called inside of train, as by a callback; allowed: after it has returned, or in another process"
        )
    if not _train_lock.acquire(timeout=WAIT_SECONDS):
        log("waiting for another run of this process to end")
        _train_lock.acquire()
    _trainer = threading.get_ident()
    try:
        yield
    finally:
        _trainer = None
        _train_lock.release()
