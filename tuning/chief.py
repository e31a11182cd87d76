"""The chief of a search with several processes: it hands out trials over gRPC, and keeps a pool of local workers.

The chief answers every client that reaches its port, without a password, so it listens on loopback by default. A local
worker that dies is started again and gets its trial back. If a worker on another machine dies, the next worker that
asks gets its trial.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cifar10_trainer.errors import RunError
from cifar10_trainer.process import Log

from .options import LOOPBACK, Options
from .worker import worker_main

if TYPE_CHECKING:
    from .oracle import SearchOracle

MAX_DEATHS = 15  # times the number of workers: deaths while no trial begins or ends
SAVE_SECONDS = 120.0  # that workers may take to finish their step and save


def listening_address(wanted: str | None) -> str:
    """Checks that an address is free to listen on.

    Args:
        wanted: HOST:PORT; None: a free port on loopback.

    Returns:
        HOST:PORT, with a port greater than 0.

    Raises:
        RunError: if the address is in use or not of this machine. gRPC would share a port in use without an error.
    """
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


class WorkerPool:
    """The workers on this machine: processes that train trials of the chief.

    Args:
        space: hyperparameters -> Config; picklable.
        dataset: the images, or a function that loads them; picklable.
        options: the options of the search; `local_workers` is the number of workers.
        address: the chief's HOST:PORT.
        log: prints a line.
    """

    def __init__(self, space: Any, dataset: Any, options: Options, address: str, log: Log):
        host, _, port = address.rpartition(":")
        # If the chief listens on all addresses, local workers use loopback.
        reachable = f"{LOOPBACK}:{port}" if host in ("0.0.0.0", "[::]") else address
        worker = replace(options, role="worker", chief=reachable, workers=None, overwrite=False, verbose=0)
        self.count, self.log = options.local_workers, log
        self._arguments = (space, dataset, asdict(worker))
        self._processes: dict[int, Any] = {}
        self._deaths, self._progress = 0, None

    def start(self, number: int) -> None:
        """Starts the process of a worker.

        Args:
            number: of the worker, from 0.
        """
        context = multiprocessing.get_context("spawn")  # TensorFlow does not work in a forked process
        process = context.Process(target=worker_main, args=(number, *self._arguments), daemon=True)
        process.start()
        self._processes[number] = process
        self.log(f"worker {number}: process {process.pid}")

    def ensure_running(self, progress: Any) -> None:
        """Starts each worker that has not started yet, or that a signal has ended.

        Args:
            progress: any value that changes when a trial begins or ends. Each change resets the number of deaths.

        Raises:
            RunError: if a worker ended with an error, or if workers die again and again without progress.
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
                self.log(f"worker {number} was ended by {name}; its trial is run again")
                self.start(number)

    def stop(self) -> None:
        """Ends all workers. A worker that is training saves its state first; after SAVE_SECONDS in all it is killed."""
        for process in self._processes.values():
            process.terminate()
        end = time.monotonic() + SAVE_SECONDS
        for process in self._processes.values():
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()


@contextmanager
def serving(oracle: SearchOracle, address: str) -> Iterator[None]:
    """A context in which workers reach the oracle over gRPC.

    At its end the port is free, and no late report of a worker reaches the oracle. KerasTuner's own `start_server` has no
    such end.

    Args:
        oracle: answers the workers.
        address: the HOST:PORT to listen on.

    Raises:
        RunError: if the address is in use.
    """
    import grpc  # late, as KerasTuner does
    from keras_tuner.src import protos
    from keras_tuner.src.distribute.oracle_chief import OracleServicer

    server = grpc.server(ThreadPoolExecutor(max_workers=1), options=[("grpc.so_reuseport", 0)])
    protos.get_service_grpc().add_OracleServicer_to_server(OracleServicer(oracle), server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise RunError(f"cannot listen on {address}; choose another --chief=HOST:PORT") from error
    server.start()
    try:
        yield
    finally:
        server.stop(grace=1).wait()


def run_chief(oracle: SearchOracle, pool: WorkerPool, address: str) -> None:
    """Hands out trials until the search is over, and every worker on another machine knows that.

    Args:
        oracle: chooses the hyperparameters.
        pool: the local workers; it may be empty.
        address: the HOST:PORT to listen on.

    Raises:
        RunError: if the address is in use, the workers of the pool fail, or the oracle did.
    """
    oracle.save()
    with serving(oracle, address):
        try:
            while not oracle.stopped:
                if oracle.failure is not None:  # in a thread of the server; only a worker has heard of it
                    raise oracle.failure
                pool.ensure_running((len(oracle.trials), len(oracle.end_order)))
                time.sleep(0.2)
            local = {f"worker{number}" for number in range(pool.count)}
            while oracle.live_workers() - local:
                time.sleep(0.2)
        finally:
            pool.stop()
