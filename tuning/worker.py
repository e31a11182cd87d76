"""A worker: a process that trains trials for a chief.

This module imports TensorFlow inside functions only, because a worker's process chooses its GPU before that. A worker
whose chief does not answer ends by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from glob import glob
from typing import TYPE_CHECKING, Any

from cifar10_trainer import cli, process
from cifar10_trainer.errors import ConfigError, RunError, RunInterrupted

from .options import Options
from .search_folder import SearchFolder

if TYPE_CHECKING:
    from .trial import DatasetOrLoader, SpaceFunction


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, and restores them at the end of the context.

    Args:
        values: name -> value.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def distributed(tuner_id: str, address: str) -> contextlib.AbstractContextManager[None]:
    """A context in which KerasTuner acts as a worker of a chief.

    Args:
        tuner_id: of the worker; KerasTuner takes an id with the word "chief" in it for the chief's.
        address: the chief's HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    return environment(
        {
            "KERASTUNER_TUNER_ID": tuner_id,
            "KERASTUNER_ORACLE_IP": host,
            "KERASTUNER_ORACLE_PORT": port,
            "no_grpc_proxy": host,  # otherwise gRPC would ask the proxy of the web for the chief
        }
    )


@contextlib.contextmanager
def project_errors(options: Options) -> Iterator[None]:
    """A context that turns errors of KerasTuner and gRPC into errors of one line.

    Args:
        options: the options of the search, for the address and the timeout in the text.

    Raises:
        RunInterrupted: if a signal stopped a trial.
        RunError: if the chief does not answer or fails, or if the search cannot continue.
    """
    import grpc
    from keras_tuner import errors

    try:
        yield
    except (errors.FatalError, grpc.RpcError) as error:
        cause = error if isinstance(error, grpc.RpcError) else error.__cause__
        if not isinstance(cause, grpc.RpcError):
            kind = RunInterrupted if isinstance(cause, RunInterrupted) else RunError
            raise kind(str(error)) from error
        if cause.code() is grpc.StatusCode.UNKNOWN:  # the chief answered with an error of its own
            raise RunError(f"the chief at {options.chief} failed: {cause.details()}") from error
        code = cause.code().name.lower().replace("_", " ")
        raise RunError(
            f"no answer from the chief at {options.chief} in {options.chief_timeout:g} s ({code});"
            " start the chief, and then this worker again"
        ) from error


def run_worker(space: SpaceFunction, dataset: DatasetOrLoader, options: Options, tuner_id: str) -> None:
    """Trains trials of the chief at `options.chief` until the search is over.

    Args:
        space: hyperparameters -> Config, the same as the chief's.
        dataset: the images, or a function that loads them.
        options: the options of the search, with the role "worker".
        tuner_id: an id that no other worker has.

    Raises:
        ConfigError: if the space is invalid.
        RunError: if the chief does not answer, fails or runs another search, or if a signal stopped a trial.
    """
    from keras_tuner.src.distribute import oracle_client

    from . import trial

    assert options.chief is not None
    oracle_client.TIMEOUT = options.chief_timeout  # KerasTuner's is an hour, and it has no argument for it
    data = trial.load(dataset)
    description, hp = trial.describe_search(space, data)
    with distributed(tuner_id, options.chief), project_errors(options):
        oracle = trial.make_search_oracle(description, hp, options)
        folder = SearchFolder(options.workdir).trials
        tuner = trial.ConfigTuner(oracle, space, data, folder, verbose=options.verbose)
        tuner.oracle = RetryingClient(tuner.oracle, options.chief_timeout)
        tuner.search()
    if options.verbose:
        print("the search is over")


@process.enduring_output()
def worker_main(number: int, space: Any, dataset: Any, options: dict[str, Any]) -> None:
    """The main function of a local worker's process. Chooses the GPU, and then imports TensorFlow.

    Args:
        number: of the worker, from 0. With several GPUs, it selects one of them.
        space: hyperparameters -> Config; picklable.
        dataset: the images, or a function that loads them; picklable.
        options: the fields of `Options`.
    """
    # Ctrl-C and SIGHUP of a terminal reach a whole group. The chief gets them, and ends its workers by SIGTERM.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # several workers may share a GPU
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(glob("/dev/nvidia[0-9]*"))))))
    if "," in gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[number % len(gpus.split(","))]
    try:
        cli.import_tensorflow()
        run_worker(space, dataset, Options(**options), f"worker{number}")
    except KeyboardInterrupt:
        sys.exit(130)
    except RunInterrupted:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the exit status shows the signal that stopped it
        os.kill(os.getpid(), signal.SIGTERM)
    except (ConfigError, RunError) as error:
        print(f"error: worker {number}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _end_with_parent() -> None:
    """Waits for the end of the parent process, and then ends this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class RetryingClient:
    """KerasTuner's client of the chief, which repeats a call if the connection was lost before the answer.

    KerasTuner's client itself waits for a chief that has not started. A repeated call does no harm: `SearchOracle`
    ignores a second report of a trial, and gives a worker the same trial again. A call that fails for good raises
    KerasTuner's FatalError, whose cause is gRPC's error.

    Args:
        client: KerasTuner's client.
        timeout: seconds after which a call fails.
    """

    def __init__(self, client: Any, timeout: float):
        self._client, self._timeout = client, timeout

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return partial(self._call, attribute) if callable(attribute) else attribute

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        import grpc
        from keras_tuner import errors

        end = time.monotonic() + self._timeout
        while True:
            try:
                return method(*arguments, **options)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                    # KerasTuner prints the traceback of any other error at the end of a trial, and calls the trial failed.
                    raise errors.FatalError("the chief does not answer, or failed") from error
                time.sleep(0.5)
