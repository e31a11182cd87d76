"""The chief of a search of several processes: hands out trials over gRPC, and keeps the workers of this machine.

The chief speaks to whoever reaches its port, without a password: it listens on loopback unless told otherwise.
A worker that dies is started again and gets its trial back; one on another machine loses it to the next worker
that asks.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cifar10_trainer.errors import RunError

from .options import LOOPBACK, Options
from .worker import distributed, worker_main

if TYPE_CHECKING:
    from .oracle import SearchOracle
    from .trial import ConfigTuner

MAX_DEATHS = 15  # of each worker in a row, with no trial begun or ended between
CHIEF = "chief"  # KerasTuner knows the chief by this word in its id


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


class WorkerPool:
    """The workers on this machine: processes that take trials from the chief at `address`."""

    def __init__(self, space: Any, dataset: Any, options: Options, address: str, log: Callable[[str], None]):
        host, _, port = address.rpartition(":")
        # A chief that listens on every address is nearest on loopback.
        reachable = f"{LOOPBACK}:{port}" if host in ("0.0.0.0", "[::]") else address
        worker = replace(options, role="worker", chief=reachable, workers=None, overwrite=False, verbose=0)
        self.count, self.log = options.local_workers, log
        self._arguments = (space, dataset, asdict(worker))
        self._processes: dict[int, Any] = {}
        self._deaths, self._progress = 0, None

    def start(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
        process = context.Process(target=worker_main, args=(number, *self._arguments), daemon=True)
        process.start()
        self._processes[number] = process
        self.log(f"worker {number}: process {process.pid}")

    def ensure_running(self, progress: Any) -> None:
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
                self.log(f"worker {number} was ended by {name}; its trial is run again")
                self.start(number)

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()  # in the middle of a trial it saves that first
        for process in self._processes.values():
            process.join(30)
            process.kill()
            process.join()


def run_chief(tuner: ConfigTuner, oracle: SearchOracle, pool: WorkerPool, address: str) -> None:
    """Is the chief until the search is over, and every worker elsewhere has been told."""
    with distributed(CHIEF, address):
        server = threading.Thread(target=tuner.search, name="chief", daemon=True)
        server.start()
        try:
            while not oracle.stopped:
                pool.ensure_running((len(oracle.trials), len(oracle.end_order)))
                time.sleep(0.2)
                if not server.is_alive() and not oracle.stopped:
                    raise RunError("KerasTuner's chief has ended early; --debug may show more")
            own = {f"worker{number}" for number in range(pool.count)}
            while oracle.live_workers() - own:
                time.sleep(0.2)
        finally:
            pool.stop()
