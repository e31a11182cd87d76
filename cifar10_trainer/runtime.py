"""Where a run computes: devices, strategy, precision, seed. Each choice comes with its reason, for people."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from .errors import ConfigError, RunError

_IMPORTED = time.time()


def choose_strategy(requested: str) -> tuple[tf.distribute.Strategy, str]:
    """The strategy for "auto", "none", "mirrored" or "multi_worker", and why.

    mirrored takes every visible GPU, or every logical CPU device where there is no GPU (one, unless configured
    otherwise). multi_worker reads the cluster from TF_CONFIG. Raises ConfigError where that is missing.
    """
    if requested == "multi_worker" or (requested == "auto" and _cluster()):
        return _multi_worker()  # before anything else wakes the devices, which TensorFlow would not forgive
    gpus = tf.config.list_logical_devices("GPU")
    cpus = tf.config.list_logical_devices("CPU")
    if requested == "auto":
        requested = "mirrored" if len(gpus) > 1 else "none"
    if requested == "none":
        return tf.distribute.get_strategy(), f"on one device: {(gpus or cpus)[0].name}"
    devices = tuple(d.name for d in gpus or cpus)
    return _mirrored(devices), f"{len(devices)} replica(s): {', '.join(devices)}"


@functools.cache  # the reductions of two such strategies in one process would get in each other's way
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
    """The addresses in TF_CONFIG, by kind of task; empty where there are none. Raises ConfigError on what is no JSON."""
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        return dict(json.loads(text).get("cluster") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"TF_CONFIG is {text[:200]!r}; allowed: JSON with 'cluster' and 'task', or nothing"
        ) from error


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes the run's files: true but for the further workers of a cluster."""
    resolver = strategy.cluster_resolver
    if resolver is None or resolver.task_type in (None, "", "chief"):
        return True
    return resolver.task_id in (None, 0) and "chief" not in resolver.cluster_spec().jobs


def mean_over_workers(strategy: tf.distribute.Strategy, *values: float) -> tuple[float, ...]:
    """The mean of each number over the workers of a cluster, which wait here for one another.

    Without a cluster, the numbers themselves.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return values
    return tuple(_mean_function(strategy)(tf.constant(values, tf.float64)).numpy().tolist())


@functools.cache
def _mean_function(strategy: tf.distribute.Strategy) -> Callable[[tf.Tensor], tf.Tensor]:
    def mean(values):
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
    native = cpu_flags() & {"avx512_bf16", "amx_bf16"}
    if native:
        return "mixed_bfloat16", f"the processor has {', '.join(sorted(native))}"
    return "float32", "the processor has no native bfloat16"


def cpu_flags() -> set[str]:
    """The processor's feature flags, as Linux tells them; empty elsewhere."""
    return set(_cpu().get("flags", "").split())


def _cpu() -> dict[str, str]:
    """What Linux tells of the first processor, by the names it has there; empty elsewhere."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return found


def process_start() -> float:
    """When this process began, in seconds since the epoch, so that imports count; a moment ago where unknown."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return _IMPORTED


def describe() -> dict[str, str]:
    """Versions and hardware, for a run's record."""
    import numpy as np

    cpu = _cpu()
    processor = cpu.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= set(cpu):  # a virtual machine's name for it tells the maker only
        processor += f" (family {cpu['cpu family']}, model {cpu['model']})"
    # Of this process: `taskset` may leave it fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(g).get("device_name", "GPU") for g in gpus]
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": f"{processor}, {cores} core{'' if cores == 1 else 's'}",
        "gpus": ", ".join(names) or "none",
    }


class Signals:
    """Catches SIGINT and SIGTERM within: `caught` is the first one's name; a second SIGINT interrupts at once.

    One within another begins with what that has caught, and leaves to it what came too late for itself.
    """

    caught = ""

    def __call__(self, number: int, frame: Any) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = signal.Signals(number).name

    def __enter__(self) -> Signals:
        self._before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
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
    """Raises ConfigError where a global batch cannot be cut from n images or shared by the replicas."""
    if batch_size > n:
        raise ConfigError(f"batch_size is {batch_size}; allowed: at most the {n} training images")
    if batch_size % replicas:
        raise ConfigError(f"batch_size is {batch_size}; allowed: a multiple of the {replicas} replicas")


def out_of_memory(error: Exception) -> RunError:
    """The one-line error for a TensorFlow ResourceExhaustedError."""
    return RunError(f"out of memory: use a smaller --batch_size ({str(error).splitlines()[0][:200]})")


def lost_worker(error: Exception) -> RunError:
    """The one-line error for what TensorFlow raises when a process of the cluster has gone."""
    return RunError(
        "another worker of the cluster has gone; start all of them again with the same --workdir, to go on from"
        f" what was saved last ({' '.join(str(error).split())[-200:]})"
    )
