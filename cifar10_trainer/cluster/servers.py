"""TensorFlow's own meeting of the workers, bounded in time."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from .. import process
from .place import Place

CONNECT = 40.0  # seconds that TensorFlow's servers get to find one another

_GUARD = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    print("error:", sys.argv[3], file=sys.stderr, flush=True)
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


@contextlib.contextmanager
def _bounded_as_first_process() -> Iterator[None]:
    """Bounds the block in the first process of a container, whom no other one in it can kill."""
    if os.getpid() != 1:
        yield
        return
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(CONNECT + 1, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def connecting_servers(place: Place) -> Iterator[None]:
    """Bounds the time in which TensorFlow's servers find one another. Python stands still meanwhile.

    All workers have just met, so this takes a moment; unless one of them dies in it. A process beside this one ends it after
    CONNECT seconds then. Ctrl-C ends it at once. TensorFlow replaces the handler of SIGTERM; at the end it is put back.
    """
    text = f"{place.name()}: TensorFlow's servers have not found one another in {CONNECT:g} s; start all workers again"
    words = [sys.executable, "-S", "-c", _GUARD, str(os.getpid()), str(CONNECT), text]
    with (
        _bounded_as_first_process(),
        subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as guard,
    ):
        before = process.set_handlers(signal.SIG_DFL, (signal.SIGTERM, signal.SIGINT))
        try:
            yield
        finally:
            process.restore_handlers(before)
            assert guard.stdin is not None
            guard.stdin.close()  # it ends
