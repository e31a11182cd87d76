"""What surrounds a process: the signals that stop it, its standard streams, the commands that it runs."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO, TypeAlias, cast

from .errors import RunError, reason_of

Log: TypeAlias = Callable[[str], None]  # prints a line, or drops it


def line_printer(shown: object) -> Log:
    """Prints each line at once, even into a pipe; where `shown` is false, drops it."""
    return functools.partial(print, flush=True) if shown else (lambda text: None)


def stop_signals() -> list[int]:
    """SIGINT, SIGTERM and SIGHUP; without SIGHUP where the process ignores it, as `nohup` starts one."""
    found: list[int] = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return found


def set_handlers(handler: Any, numbers: Iterable[int]) -> dict[int, Any]:
    """Sets the handler of signals. Only the main thread may, and what a program around Python handles stays its own.

    Returns the handlers before, for `restore_handlers`.
    """
    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):
        for number in numbers:
            if signal.getsignal(number) is not None:
                before[number] = signal.signal(number, handler)
    return before


def restore_handlers(before: Mapping[int, Any]) -> None:
    """Undoes `set_handlers`."""
    for number, handler in before.items():
        signal.signal(number, handler)


def hold_interrupt() -> None:
    """Lets SIGINT wait until `admit_interrupt`, also in the program that replaces this one. Not on Windows."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def admit_interrupt() -> None:
    """Ends `hold_interrupt`: raises KeyboardInterrupt where a SIGINT has waited."""
    if hasattr(signal, "pthread_sigmask"):  # Windows has none
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


# ---- standard streams


class EnduringStream:
    """A text stream that does not fail. Once its reader has gone or its device is full, everything is dropped.

    Characters that its encoding lacks become escapes.

    Args:
        stream: what to write to, with `write` at least; None: nothing, as where a shell has closed it.
        lost: called once, with the error.
    """

    def __init__(self, stream: TextIO | None, lost: Callable[[Exception], None]):
        self._nowhere = open(os.devnull, "w") if stream is None else None  # noqa: SIM115  # until `release`
        self._stream = stream or cast(TextIO, self._nowhere)
        self._lost: Callable[[Exception], None] | None = lost

    def write(self, text: str) -> int:
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self._try(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(getattr(self._stream, "flush", lambda: None))

    def isatty(self) -> bool:
        return not self._is_closed() and getattr(self._stream, "isatty", bool)()

    def _is_closed(self) -> bool:
        return getattr(self._stream, "closed", False)

    def release(self) -> None:
        """Closes what stood in for a stream that was closed from the start."""
        if self._nowhere is not None:
            self._nowhere.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, function: Callable[..., Any], *arguments: str) -> None:
        try:
            function(*arguments)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self._is_closed():
                raise  # a character that its encoding lacks
            to_nowhere(self._stream)
            lost, self._lost = self._lost, None
            if lost is not None:
                lost(error)


def to_nowhere(stream: TextIO) -> None:
    """Leads the file descriptor of a broken stream to nowhere, or Python would fail at exit with what is left to write."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file may be behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def enduring_stderr() -> Iterator[None]:
    """Within it, an error of stderr ends nothing: the exit status shows what happened."""
    with _replaced("stderr", lambda error: None):
        yield


@contextlib.contextmanager
def enduring_output() -> Iterator[None]:
    """Within it, an error of stdout or stderr ends nothing. The first one of stdout is one line on stderr."""

    def lost(error: Exception) -> None:
        text = f"stdout cannot be written ({reason_of(error)}); continuing without it; the folder shows the progress"
        print(f"warning: {text}", file=sys.stderr, flush=True)

    with enduring_stderr(), _replaced("stdout", lost):
        yield


@contextlib.contextmanager
def _replaced(name: str, lost: Callable[[Exception], None]) -> Iterator[None]:
    """Replaces sys.stdout or sys.stderr by an EnduringStream, unless it is one."""
    before = getattr(sys, name)
    if isinstance(before, EnduringStream):
        yield
        return
    stream = EnduringStream(before, lost)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        stream.flush()
        setattr(sys, name, before)
        stream.release()


def open_standard_streams() -> None:
    """Opens the descriptors 0 to 2 where a shell has closed them. Otherwise the next files would get them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


# ---- commands


def call(words: Sequence[str], **options: Any) -> tuple[int, str]:
    """Runs a command to its end. It passes on the signals that stop this process, and waits for what is being saved.

    The command is in a session of its own, so that it gets each signal once: Ctrl-C on a terminal reaches a whole group.

    Args:
        words: the command.
        options: of `subprocess.Popen`.

    Returns:
        (exit status, name of the first signal that was passed on; empty without one).
    """
    children: list[subprocess.Popen] = []
    with passing_on(children) as caught:
        children.append(subprocess.Popen(words, start_new_session=True, **options))
        for number in caught:  # they arrived before there was anything to pass them on to
            children[0].send_signal(number)
        status = children[0].wait()
    return status, signal.Signals(caught[0]).name if caught else ""


def failure(what: str, stopped_by: str) -> RunError:
    """The error for a command of `call` that failed or was stopped. `what` names it; `stopped_by`: as `call` returns it."""
    how = f"was stopped by {stopped_by}" if stopped_by else "failed"
    return RunError(f"{what} {how}; its own line above shows more")


@contextlib.contextmanager
def passing_on(children: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """Within it, the signals that stop this process go to `children` instead, which may come and go. Gives those caught."""
    caught: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        caught.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = set_handlers(pass_on, stop_signals())
    try:
        yield caught
    finally:
        restore_handlers(before)
