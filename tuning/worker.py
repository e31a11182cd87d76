"""A worker: takes trials from the chief. Importing this costs no TensorFlow, whose devices a process chooses first.

A worker whose chief is gone ends by itself.
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

from cifar10_trainer import cli
from cifar10_trainer.errors import ConfigError, RunError, RunInterrupted

from .options import Options
from .search_folder import SearchFolder

if TYPE_CHECKING:
    from .trial import DatasetOrLoader, SpaceFunction


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, within."""
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
    """Makes KerasTuner, within, the chief at `address` (tuner_id: CHIEF) or a worker of it."""
    host, _, port = address.rpartition(":")
    return environment(
        {
            "KERASTUNER_TUNER_ID": tuner_id,
            "KERASTUNER_ORACLE_IP": host,
            "KERASTUNER_ORACLE_PORT": port,
            "no_grpc_proxy": host,  # a proxy for the web would be asked for the chief, too
        }
    )


@contextlib.contextmanager
def project_errors(options: Options) -> Iterator[None]:
    """Turns KerasTuner's and gRPC's errors into the project's."""
    import grpc
    from keras_tuner import errors

    try:
        yield
    except errors.FatalError as error:
        kind = RunInterrupted if isinstance(error.__cause__, RunInterrupted) else RunError
        raise kind(str(error)) from error
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNKNOWN:  # it answered, with an error of its own
            raise RunError(f"the chief at {options.chief} failed: {error.details()}") from error
        code = error.code().name.lower().replace("_", " ")
        raise RunError(
            f"no answer from the chief at {options.chief} in {options.chief_timeout:g} s ({code}); start it, then this worker again"
        ) from error


def run_worker(space: SpaceFunction, dataset: DatasetOrLoader, options: Options, tuner_id: str) -> None:
    """Takes trials from the chief at `options.chief` until there are no more.

    Raises ConfigError or RunError where that cannot be, as when no chief answers.
    """
    from keras_tuner.src.distribute import oracle_client

    from . import trial

    assert options.chief is not None
    oracle_client.TIMEOUT = options.chief_timeout  # it is an hour, and no argument
    data = dataset() if callable(dataset) else dataset
    record, hp = trial.describe_search(space, data)
    with distributed(tuner_id, options.chief), project_errors(options):
        oracle = trial.make_search_oracle(record, hp, options)
        folder = SearchFolder(options.workdir).trials
        tuner = trial.ConfigTuner(
            oracle, space, data, folder, digest=oracle.search, lease=options.lease, verbose=options.verbose
        )
        tuner.oracle = RetryingClient(tuner.oracle, options.chief_timeout)
        tuner.search()
    if options.verbose:
        print("the search is over")


def worker_main(number: int, space: Any, dataset: Any, options: dict[str, Any]) -> None:
    """The main function of a worker's process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # workers may have to share a GPU
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(glob("/dev/nvidia[0-9]*"))))))
    if "," in gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[number % len(gpus.split(","))]
    try:
        cli.import_tensorflow()
        run_worker(space, dataset, Options(**options), f"worker{number}")
    except KeyboardInterrupt:
        sys.exit(130)
    except RunInterrupted:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends as what it was asked to end by
        os.kill(os.getpid(), signal.SIGTERM)
    except (ConfigError, RunError) as error:
        print(f"error: worker {number}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class RetryingClient:
    """KerasTuner's client of the chief, which asks again where the chief was lost in the middle of an answer.

    It waits by itself for a chief that is not there. Asking twice does no harm: see `SearchOracle`.
    """

    def __init__(self, client: Any, timeout: float):
        self._client, self._timeout = client, timeout

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return partial(self._call, attribute) if callable(attribute) else attribute

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        import grpc

        end = time.monotonic() + self._timeout
        while True:
            try:
                return method(*arguments, **options)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                    raise
                time.sleep(0.5)
