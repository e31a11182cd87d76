"""Several processes in one search: KerasTuner's chief, which hands out trials over gRPC, and its workers.

The chief speaks to whoever reaches its port, without a password: it listens on loopback unless told otherwise.
A worker that dies is started again and gets its trial back; one on another machine loses it to the next worker
that asks. A worker whose chief is gone ends by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from glob import glob
from typing import TYPE_CHECKING, Any

from cifar10_trainer import cli
from cifar10_trainer.errors import ConfigError, RunError, RunInterrupted

from .options import LOOPBACK, Options

if TYPE_CHECKING:
    from .oracle import SearchOracle
    from .tuner import Trainer

MAX_DEATHS = 15  # of each worker in a row, with no trial begun or ended between
CHIEF = "chief"  # KerasTuner knows the chief by this word in its id


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


def listening_address(wanted: str | None) -> str:
    """`wanted`, or a free port on loopback. Raises RunError where it is taken: gRPC would share it silently."""
    host, _, port = (wanted or f"{LOOPBACK}:0").rpartition(":")
    try:
        family, kind, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            return f"{host}:{probe.getsockname()[1]}"
    except OSError as error:
        raise RunError(
            f"cannot listen on {wanted}: {error.strerror}; choose another --chief=HOST:PORT"
        ) from error


class PatientClient:
    """KerasTuner's client of the chief, which asks again where the chief was lost in the middle of an answer.

    It waits by itself for a chief that is not there. Asking twice does no harm: see `SearchOracle`.
    """

    def __init__(self, client: Any, patience: float):
        self._client, self._patience = client, patience

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return partial(self._ask, attribute) if callable(attribute) else attribute

    def _ask(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        import grpc

        end = time.monotonic() + self._patience
        while True:
            try:
                return method(*arguments, **options)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                    raise
                time.sleep(0.5)


class Team:
    """The workers on this machine: processes that take trials from the chief at `address`."""

    def __init__(self, space: Any, dataset: Any, options: Options, address: str, say: Callable[[str], None]):
        host, _, port = address.rpartition(":")
        # A chief that listens on every address is nearest on loopback.
        near = f"{LOOPBACK}:{port}" if host in ("0.0.0.0", "[::]") else address
        worker = replace(options, role="worker", chief=near, workers=None, overwrite=False, verbose=0)
        self.count, self.say = options.local_workers, say
        self._arguments = (space, dataset, asdict(worker))
        self._processes: dict[int, Any] = {}
        self._deaths, self._progress = 0, None

    def start(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
        process = context.Process(target=_work, args=(number, *self._arguments), daemon=True)
        process.start()
        self._processes[number] = process
        self.say(f"worker {number}: process {process.pid}")

    def tend(self, progress: Any) -> None:
        """Starts those that are not there. progress: anything that changes as the search goes on.

        Raises RunError when a worker cannot do its work at all.
        """
        if progress != self._progress:
            self._deaths, self._progress = 0, progress
        for number in range(self.count):
            process = self._processes.get(number)
            if process is None:
                self.start(number)
            elif process.exitcode:
                self._deaths += 1
                if process.exitcode > 0 or self._deaths > MAX_DEATHS * self.count:
                    raise RunError(f"worker {number} ended with status {process.exitcode}; try --workers=1")
                name = signal.Signals(-process.exitcode).name
                self.say(f"worker {number} was ended by {name}; its trial is run again")
                self.start(number)

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()  # in the middle of a trial it saves that first
        for process in self._processes.values():
            process.join(30)
            process.kill()
            process.join()


def lead(tuner: Trainer, oracle: SearchOracle, team: Team) -> None:
    """Is the chief until the search is over, and every worker elsewhere has been told."""
    server = threading.Thread(target=tuner.search, name="chief", daemon=True)
    server.start()
    try:
        while not oracle.stopped:
            team.tend((len(oracle.trials), len(oracle.end_order)))
            time.sleep(0.2)
            if not server.is_alive() and not oracle.stopped:
                raise RunError("KerasTuner's chief has ended early; --debug may show more")
        own = {f"worker{number}" for number in range(team.count)}
        while oracle.workers() - own:
            time.sleep(0.2)
    finally:
        team.stop()


def _work(number: int, space: Any, dataset: Any, options: dict[str, Any]) -> None:
    """The main function of a worker's process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # workers may have to share a GPU
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(glob("/dev/nvidia[0-9]*"))))))
    if "," in gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[number % len(gpus.split(","))]
    try:
        cli.import_tensorflow()
        from .tuner import work

        work(space, dataset, Options(**options), f"worker{number}")
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
