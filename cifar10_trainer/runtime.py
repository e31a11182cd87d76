"""Where and how a run computes: devices, strategy, precision. Each choice comes with its reason, to be printed."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from . import cluster, machine, precision, process
from .config import Config
from .errors import ConfigError, RunError
from .process import Log

SAME_REQUEST_SECONDS = 1.0  # between two signals that mean one request to stop


def choose_strategy(requested: str) -> tuple[tf.distribute.Strategy, str]:
    """The strategy, and the reason for it.

    Args:
        requested: "none"; "mirrored": every visible GPU, or every logical CPU device where there is no GPU; "multi_worker":
            the cluster in TF_CONFIG; "auto": multi_worker with a cluster, mirrored with several GPUs, else none.

    Raises:
        ConfigError: if multi_worker finds no cluster.
    """
    if cluster.join_workers(requested) is not None:
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
    # It reads TF_CONFIG, which may be left over from something else.
    left_over = os.environ.pop("TF_CONFIG", None)
    try:
        return tf.distribute.MirroredStrategy(list(devices))
    finally:
        if left_over is not None:
            os.environ["TF_CONFIG"] = left_over


def split_cpu(replicas: int) -> None:
    """Makes so many logical devices of the CPU, and hides the GPUs: what `mirrored` then trains on.

    Raises ConfigError where TensorFlow has initialized its devices already.
    """
    (cpu, *_) = tf.config.list_physical_devices("CPU")
    try:
        tf.config.set_visible_devices([], "GPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    except RuntimeError as error:
        raise ConfigError(
            f"the CPU cannot be split any more: {error}; allowed: before TensorFlow is used"
        ) from error


@functools.cache
def _multi_worker() -> tuple[tf.distribute.Strategy, str]:
    team = cluster.team()
    assert team is not None  # `choose_strategy` made it
    team.free_port()
    try:
        with team.reporting_errors(), cluster.connecting_servers(team.place):
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        if "program startup" not in str(error):
            raise
        raise ConfigError(
            "TensorFlow is in use already, and its server for several workers must start before; call"
            " cifar10_trainer.runtime.choose_strategy('multi_worker') before you make models, tensors or tf.data"
        ) from error
    except tf.errors.OpError as error:
        raise RunError(
            f"{team.place.name()}: TensorFlow's server did not start ({_last_words(error)}); is the port free?"
        ) from error
    workers = len(team.place.addresses)
    reason = f"{strategy.num_replicas_in_sync} replica(s) on {workers} worker(s)"
    if team.alone:
        reason += "; TF_CONFIG names this worker alone; unset it to train as without a cluster"
    return strategy, reason


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


_auto: contextvars.ContextVar[str | None] = contextvars.ContextVar("auto", default=None)


@contextlib.contextmanager
def auto_precision(policy: str | None) -> Iterator[None]:
    """While inside, the precision "auto" is `policy` for this thread: runs that are compared train alike. None: as outside."""
    token = _auto.set(policy or _auto.get())
    try:
        yield
    finally:
        _auto.reset(token)


def choose_precision(requested: str, *, depthwise: bool = False) -> tuple[str, str]:
    """The Keras dtype policy for "auto" or a policy's name, and why.

    auto: on GPUs, bfloat16 where they multiply it natively, float16 where they only have that, else float32. On a CPU,
    bfloat16 where the processor multiplies it natively and is measured to be faster with it, else float32. The
    measurement uses TensorFlow's devices, so `choose_strategy` comes before this.

    Args:
        requested: "auto" or a policy's name.
        depthwise: whether the network has depthwise convolutions.
    """
    gpus = tf.config.get_visible_devices("GPU")
    if requested != "auto":
        return requested, "as asked" + (
            "; slow on a CPU" if requested == "mixed_float16" and not gpus else ""
        )
    if (fixed := _auto.get()) is not None:
        return fixed, "the runs before it have it"
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability")
        if capability is None:
            return "float32", "this GPU names no compute capability"
        text = ".".join(str(c) for c in capability)
        if capability >= (8, 0):
            return "mixed_bfloat16", f"the GPU's compute capability {text} has bfloat16"
        if capability >= (7, 0):
            return "mixed_float16", f"the GPU's compute capability {text} has float16, not bfloat16"
        return "float32", f"the GPU's compute capability {text} has no fast 16-bit arithmetic"
    if not precision.native_flags():
        return "float32", "no native bfloat16 here"
    if depthwise:
        return "float32", "TensorFlow has no fast bfloat16 kernels for depthwise convolutions on a CPU"
    ratio, source = precision.bfloat16_ratio()
    limit = precision.CLEARLY_AHEAD
    if ratio <= limit:
        return "mixed_bfloat16", f"convolutions take {ratio:.2f} of float32's time here ({source})"
    return "float32", (
        f"convolutions take {ratio:.2f} of its time in bfloat16 here; at most {limit:.2f} would be worth it ({source})"
    )


def choose_devices(
    config: Config, cluster_timeout: float, log: Log, flags: Mapping[str, bool]
) -> tuple[cluster.Team | None, tf.distribute.Strategy]:
    """The workers of the cluster, who agree on config and `flags` here, and the strategy."""
    team = cluster.join_workers(config.strategy, cluster_timeout, log)
    if team is not None:
        gpus = len(tf.config.get_visible_devices("GPU"))
        team.agree(config=config.to_dict(), GPUs=gpus, **flags)
    strategy, reason = choose_strategy(config.strategy)
    log(f"strategy: {reason}")
    if machine.without_onednn() and not tf.config.get_visible_devices("GPU"):
        log(
            "oneDNN: off, because TensorFlow was imported before cifar10_trainer, so a step may take more than twice the time; import"
            f" cifar10_trainer first, or set {machine.ONEDNN}=1"
        )
    return team, strategy


def agree_on_precision(
    requested: str,
    before: str | None,
    team: cluster.Team | None,
    log: Log,
    *,
    depthwise: bool = False,
) -> str:
    """The dtype policy of a run, the same for all its workers and for all its life.

    Args:
        requested: "auto" or a policy's name, the same on all workers.
        before: of the run that is resumed; None: a new run.
        team: the workers. With "auto", the chief's choice holds for all, also where another's hardware suggests another.
        log: prints the policy, and why.
        depthwise: whether the network has depthwise convolutions.
    """
    if requested == "auto" and before is not None:
        policy, why = before, "this run began with it"
    elif requested == "auto" and team is not None and team.place.index > 0:
        policy, why = "", f"{team.place.name(0)} chose it"
    else:
        policy, why = choose_precision(requested, depthwise=depthwise)
    if team is not None:
        policy = team.take_from_chief(policy)
    log(f"precision: {policy}: {why}")
    return policy


def at_work(strategy: tf.distribute.Strategy) -> contextlib.AbstractContextManager[None]:
    """While inside, a lost worker of the cluster ends this process. See `cluster.Team.at_work`."""
    team = cluster.team()
    if team is None or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return contextlib.nullcontext()
    return team.at_work()


@contextlib.contextmanager
def reporting_errors(team: cluster.Team | None) -> Iterator[None]:
    """While inside, an error of this process is the last thing that the other workers hear. None: there are no others.

    At the end of the block they wait for the chief, so that none reports success where the chief has failed.
    """
    if team is None:
        yield
        return
    with team.reporting_errors():
        yield
        team.take_from_chief("finished")


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
    """Catches SIGINT, SIGTERM and SIGHUP in a `with` block. A second one ends the process at once.

    `caught` is the name of the first signal, or empty. A second SIGINT raises KeyboardInterrupt. A SIGTERM or SIGHUP soon
    after the first signal is the same request: a supervisor signals all processes, and one of them passes it on to another.
    Blocks may be nested: the inner one starts with what the outer one has caught, and hands over what it has caught at its
    end.
    """

    caught = ""
    _moment = 0.0  # of the first signal

    def __call__(self, number: int, frame: Any) -> None:
        if not self.caught:
            self.caught, self._moment = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif time.monotonic() - self._moment > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)  # the first process of a container ignores it

    def __enter__(self) -> Signals:
        self._before = process.set_handlers(self, process.stop_signals())
        for enclosing in self._enclosing():
            if enclosing.caught:  # else this one may have caught one by now
                self.caught, self._moment = enclosing.caught, enclosing._moment
        return self

    def __exit__(self, *error: object) -> None:
        process.restore_handlers(self._before)
        for enclosing in self._enclosing():
            if self.caught:
                enclosing.caught, enclosing._moment = self.caught, self._moment

    def _enclosing(self) -> list[Signals]:
        return [handler for handler in self._before.values() if isinstance(handler, Signals)]


def check_batch(batch_size: int, n: int, replicas: int = 1, *, mixes: bool = False) -> None:
    """Raises ConfigError where the global batch is larger than n images, or the replicas cannot share it equally.

    mixes: whether an image is mixed with its neighbour in the replica's part of the batch, which then needs two images.
    """
    if batch_size > n:
        raise ConfigError(f"batch_size is {batch_size}; allowed: at most the {n} training images")
    if batch_size % replicas:
        raise ConfigError(f"batch_size is {batch_size}; allowed: a multiple of the {replicas} replicas")
    if mixes and batch_size == replicas:
        raise ConfigError(
            f"batch_size is {batch_size}, one image for each replica, but mixup and cutmix mix two; allowed: {2 * replicas} or more"
        )


def out_of_memory(error: Exception) -> RunError:
    """The one-line error for a TensorFlow ResourceExhaustedError."""
    return RunError(f"out of memory: use a smaller --batch_size ({str(error).splitlines()[0][:200]})")


# What TensorFlow raises when another process of the cluster has ended, and what it may raise then.
LOST_WORKER = (tf.errors.UnavailableError, tf.errors.AbortedError)
MAYBE_LOST_WORKER = (
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
)


def lost_worker(error: Exception) -> Exception:
    """The one-line error for what TensorFlow raises when another process of the cluster has ended.

    error: of LOST_WORKER or MAYBE_LOST_WORKER. Where no worker was lost, it is returned itself, or a RunError that says what to do.
    """
    team = cluster.team()
    if team is not None and team.notices_loss():
        return team.loss()
    if team is None and isinstance(error, tf.errors.AbortedError):  # of oneDNN
        return RunError(
            f"TensorFlow cannot compute this here ({_last_words(error)}); try --precision=float32"
        )
    if team is None or not isinstance(error, LOST_WORKER):
        return error
    return cluster.LostWorkerError(
        "another worker of the cluster has ended; to resume from the last saved state, start all workers again with the"
        f" same --workdir ({_last_words(error)})"
    )


def _last_words(error: Exception) -> str:
    return " ".join(str(error).split())[-200:]
