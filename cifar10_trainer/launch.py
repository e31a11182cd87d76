"""Several workers of one run on this machine, as processes that this one starts and tends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from . import cluster
from .errors import ConfigError, RunError
from .process import hold_interrupt, passing_on

# seconds in which the others end by themselves after one has failed; then again after SIGTERM
PATIENCE = 20.0


def run_local_workers(count: int, argv: Sequence[str]) -> None:
    """Runs `python -m cifar10_trainer` `count` times as one cluster on loopback, on the CPU, until all have ended.

    The first worker's output is shown, and of the others their errors. Signals that stop it are passed on. When one worker
    fails, the others are ended.

    Args:
        count: workers, 1 or more.
        argv: the arguments of each.

    Raises:
        ConfigError: the error of the worker that failed first, if it was wrong usage.
        RunError: any other error of it.
        KeyboardInterrupt: if it was interrupted before anything could be saved.
    """
    addresses = free_addresses(count)
    errors: list[list[str]] = [[] for _ in range(count)]
    workers: list[subprocess.Popen] = []
    readers = []
    with passing_on(workers) as caught:
        try:
            for index in range(count):
                workers.append(
                    _start(argv, cluster.set_tf_config(addresses, index, "--local_workers"), index == 0)
                )
                if caught:  # a signal that some of them have missed
                    raise KeyboardInterrupt
            for index, worker in enumerate(workers):
                reader = threading.Thread(target=_relay, args=(worker.stderr, index, errors[index]))
                reader.start()
                readers.append(reader)
            failed = _wait(workers)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
            for reader in readers:
                reader.join()
    if failed is None:
        return
    status = workers[failed].returncode
    # The signal itself ends a worker that is not yet in `cli.run`.
    if status == 130 or -status in caught:
        raise KeyboardInterrupt
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    text = errors[failed][-1] if errors[failed] else f"it ended with {how}"
    raise (ConfigError if status == 2 else RunError)(f"worker {failed}: {text}")


def arguments_without(argv: Sequence[str], flag: str) -> list[str]:
    """`argv` without `--flag=value` and `--flag value`."""
    kept, skip = [], False
    for word in argv:
        match = re.fullmatch(rf"--?{flag}(=.*)?", word, re.S)
        if not skip and match is None:
            kept.append(word)
        skip = match is not None and match[1] is None
    return kept


def free_addresses(count: int) -> list[str]:
    """HOST:PORT on loopback that nothing uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def _start(argv: Sequence[str], tf_config: str, first: bool) -> subprocess.Popen:
    # In a session of its own, so that Ctrl-C reaches it once, from here. Several processes cannot share a GPU's memory.
    return subprocess.Popen(
        [sys.executable, "-m", "cifar10_trainer", *argv],
        env={**os.environ, "TF_CONFIG": tf_config, "CUDA_VISIBLE_DEVICES": "-1"},
        stdin=subprocess.DEVNULL,
        stdout=None if first else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_prepare if os.name == "posix" else None,
    )


def _prepare() -> None:
    """Prepares a new process for the worker that it becomes."""
    # Python would print a traceback of a SIGINT while it starts and imports. `cli.run` admits it.
    hold_interrupt()
    if sys.platform == "linux":  # the kernel sends SIGTERM when the parent has ended, however that was
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _relay(source: IO[str], index: int, errors: list[str]) -> None:
    """Prints a worker's stderr line by line, with its name for all but the first. Keeps its final error back."""
    with source:
        for line in source:
            if line.startswith("error: "):
                errors.append(line.removeprefix("error: ").strip())
            elif line != "interrupted\n":
                print(line if index == 0 else f"worker {index}: {line}", end="", file=sys.stderr, flush=True)


def _wait(workers: Sequence[subprocess.Popen]) -> int | None:
    """Waits until all have ended, and ends them where one has failed. Returns which failed first; None: all succeeded."""
    failed, since, asked = None, 0.0, 0
    while any(worker.poll() is None for worker in workers):
        if failed is None:
            failed = next((i for i, worker in enumerate(workers) if worker.poll()), None)
            since = time.monotonic()
        elif time.monotonic() - since > PATIENCE * (asked + 1):
            asked += 1
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate() if asked == 1 else worker.kill()
        time.sleep(0.1)
    return failed if failed is not None else next((i for i, w in enumerate(workers) if w.returncode), None)
