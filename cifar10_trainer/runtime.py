"""Where and how a run computes: devices, strategy, precision. Each choice comes with its reason, to be printed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from . import machine
from .errors import ConfigError, RunError


def choose_strategy(requested: str) -> tuple[tf.distribute.Strategy, str]:
    """The strategy, and the reason for it.

    Args:
        requested: "none"; "mirrored": every visible GPU, or every logical CPU device where there is no GPU; "multi_worker":
            the cluster in TF_CONFIG; "auto": multi_worker with a cluster, mirrored with several GPUs, else none.

    Raises:
        ConfigError: if multi_worker finds no cluster.
    """
    if requested == "multi_worker" or (requested == "auto" and _cluster()):
        return _multi_worker()  # TensorFlow allows this only before anything else initializes the devices
    gpus = tf.config.list_logical_devices("GPU")
    cpus = tf.config.list_logical_devices("CPU")
    if requested == "auto":
        requested = "mirrored" if len(gpus) > 1 else "none"
    if requested == "none":
        return tf.distribute.get_strategy(), f"on one device: {(gpus or cpus)[0].name}"
    devices = tuple(d.name for d in gpus or cpus)
    return _mirrored(devices), f"{len(devices)} replica(s): {', '.join(devices)}"


def strategy_name(strategy: tf.distribute.Strategy) -> str:
    """What --strategy calls it: "none", "mirrored" or "multi_worker"."""
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return "multi_worker"
    return "mirrored" if isinstance(strategy, tf.distribute.MirroredStrategy) else "none"


def verbosity(verbose: int | str) -> int:
    """0: print nothing; 1: a progress bar; 2: one line per epoch. "auto" is 1 on a terminal, else 2.

    Raises ConfigError on any other value.
    """
    if verbose not in ("auto", 0, 1, 2):
        raise ConfigError(f"verbose is {verbose!r}; allowed: 'auto', 0, 1, 2")
    if verbose == "auto":
        return 1 if sys.stdout is not None and sys.stdout.isatty() else 2
    return int(verbose)


@functools.cache  # two such strategies in one process disturb each other's reductions
def _mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(list(devices))


@functools.cache
def _multi_worker() -> tuple[tf.distribute.Strategy, str]:
    if not _cluster():
        raise ConfigError(
            "strategy multi_worker found no cluster; set TF_CONFIG to JSON with 'cluster' (worker addresses) and 'task' "
            "(type and index) in every process, or use --strategy=mirrored for the GPUs of one machine"
        )
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    workers = sum(len(addresses) for addresses in _cluster().values())
    return strategy, f"{strategy.num_replicas_in_sync} replica(s) on {workers} worker(s)"


def _cluster() -> dict[str, list[str]]:
    """The addresses in TF_CONFIG by task type; empty where it has none. Raises ConfigError where it is not JSON."""
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        return dict(json.loads(text).get("cluster") or {})
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"TF_CONFIG is {text[:200]!r}; allowed: JSON with 'cluster' and 'task', or nothing"
        ) from error


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes the run's files. Of the workers of a cluster only one does."""
    resolver = strategy.cluster_resolver
    if resolver is None or resolver.task_type in (None, "", "chief"):
        return True
    return resolver.task_id in (None, 0) and "chief" not in resolver.cluster_spec().jobs


def mean_over_workers(strategy: tf.distribute.Strategy, *values: float) -> tuple[float, ...]:
    """The mean of each value over the workers of a cluster. They wait here for one another.

    Without a cluster: the values themselves.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return values
    return tuple(_mean_function(strategy)(tf.constant(values, tf.float64)).numpy().tolist())


@functools.cache
def _mean_function(strategy: tf.distribute.Strategy) -> Callable[[tf.Tensor], tf.Tensor]:
    def mean(values: tf.Tensor) -> tf.Tensor:
        mine = strategy.run(tf.identity, args=(values,))
        return strategy.reduce(tf.distribute.ReduceOp.MEAN, mine, axis=None)

    return tf.function(mean)


def choose_precision(requested: str) -> tuple[str, str]:
    """The Keras dtype policy for "auto" or a policy's name, and why.

    auto: bfloat16 where the hardware multiplies it natively; float16 on GPUs that only have that; float32 elsewhere.
    """
    if requested != "auto":
        return requested, "as asked"
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        text = ".".join(str(c) for c in capability)
        if capability >= (8, 0):
            return "mixed_bfloat16", f"the GPU's compute capability {text} has bfloat16"
        if capability >= (7, 0):
            return "mixed_float16", f"the GPU's compute capability {text} has float16, not bfloat16"
        return "float32", f"the GPU's compute capability {text} has no fast 16-bit arithmetic"
    native = machine.cpu_flags() & {"avx512_bf16", "amx_bf16"}
    if native:
        return "mixed_bfloat16", f"the processor has {', '.join(sorted(native))}"
    return "float32", "the processor has no native bfloat16"


def describe() -> dict[str, str]:
    """Versions and hardware, for a run's record."""
    import numpy as np

    cores = machine.cpu_count()
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(g).get("device_name", "GPU") for g in gpus]
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": f"{machine.processor()}, {cores} core{'' if cores == 1 else 's'}",
        "gpus": ", ".join(names) or "none",
    }


class Signals:
    """Catches SIGINT and SIGTERM in a `with` block. A second SIGINT raises KeyboardInterrupt at once.

    `caught` is the name of the first signal, or empty. Blocks may be nested: the inner one starts with what the outer one
    has caught, and hands over what it has caught at its end.
    """

    caught = ""

    def __call__(self, number: int, frame: Any) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = signal.Signals(number).name

    def __enter__(self) -> Signals:
        self._before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self)
        for enclosing in self._enclosing():
            self.caught = enclosing.caught
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for enclosing in self._enclosing():
            enclosing.caught = self.caught

    def _enclosing(self) -> list[Signals]:
        return [handler for handler in self._before.values() if isinstance(handler, Signals)]


def check_batch(batch_size: int, n: int, replicas: int) -> None:
    """Raises ConfigError where the global batch is larger than n images, or the replicas cannot share it equally."""
    if batch_size > n:
        raise ConfigError(f"batch_size is {batch_size}; allowed: at most the {n} training images")
    if batch_size % replicas:
        raise ConfigError(f"batch_size is {batch_size}; allowed: a multiple of the {replicas} replicas")


def out_of_memory(error: Exception) -> RunError:
    """The one-line error for a TensorFlow ResourceExhaustedError."""
    return RunError(f"out of memory: use a smaller --batch_size ({str(error).splitlines()[0][:200]})")


def lost_worker(error: Exception) -> RunError:
    """The one-line error for what TensorFlow raises when another process of the cluster has ended."""
    return RunError(
        "another worker of the cluster has ended; to resume from the last saved state, start all workers again with the"
        f" same --workdir ({' '.join(str(error).split())[-200:]})"
    )
