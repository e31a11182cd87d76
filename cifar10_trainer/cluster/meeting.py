"""The workers together: how they meet, agree, and notice that one of them is lost."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError, RunError, RunInterrupted, one_line, reason_of
from ..process import Log
from .connection import Closed, Connection, connect, listen, readable
from .place import Place, is_list_of_texts

HEARTBEAT = 2.0  # seconds between two signs of life
SILENCE = 45.0  # seconds without one, after which a worker counts as lost
GRACE = 5.0  # seconds in which the main thread may end by itself after a worker was lost
SPEAK, REPEAT = 2.0, 30.0  # seconds of waiting until it is printed, and until it is printed again
HELLO = 10.0  # seconds in which a new connection must name its worker
INTERRUPTED = "interrupted"
MENDED = "; when that is mended, start all workers again"  # the end of the text about a worker that failed
STRANGERS = 64  # connections that have not named their worker yet


class LostWorkerError(RunError):
    """Another worker of the cluster has ended, or is frozen."""


class _Waiting:
    """Prints whom this worker waits for: after SPEAK seconds, then every REPEAT seconds and when it changes."""

    def __init__(self, log: Log):
        self._log, self._began, self._next, self._text = log, time.monotonic(), SPEAK, ""

    def __call__(self, text: str) -> None:
        spent = time.monotonic() - self._began
        if spent >= self._next or (self._text and text != self._text):
            self._log(f"waiting for {text}")
            self._text, self._next = text, spent + REPEAT

    def seconds(self) -> float:
        return time.monotonic() - self._began


class Team:
    """This process among the workers of its cluster, connected to them.

    Attributes:
        place: which worker this is.
        lost: which worker was lost and how, for people; empty while all are there.

    Raises:
        ConfigError: if the workers' lists differ, or an address cannot be used.
        RunError: if others do not come within `timeout` seconds.
    """

    def __init__(self, place: Place, timeout: float, log: Log):
        self.place, self.lost, self._log, self._timeout = place, "", log, timeout
        self._members: dict[int, Connection] = {}  # of the chief: all others; of another worker: the chief
        self._changed = threading.Condition()
        self._terms: dict[tuple[int, int], dict[str, Any]] = {}  # by round and worker
        self._verdicts: dict[int, str] = {}  # by round; empty: all agree
        self._orders: dict[int, str] = {}  # by round: what the chief has decided for all
        self._outbox: list[dict[str, Any]] = []
        self._round = self._at_work = 0
        self._since = 0.0  # when a worker was lost, or work began after that
        self._listener: socket.socket | None = None
        self._strangers: list[Connection] = []  # that have not named their worker, or not met the others
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._open = True
        self._watcher = threading.Thread(target=self._watch, name="cluster", daemon=True)
        if self.alone:
            return
        try:
            self._listener = self._listen()
            self._gather() if place.index == 0 else self._find_chief()
            self._check_reach()
        except BaseException as error:
            self._send_to_all(failed=_one_line(error))
            self.close()
            raise
        finally:
            for connection in self._strangers:
                connection.close()
            self._strangers.clear()
        for connection in self._members.values():
            connection.heard = time.monotonic()
        self._watcher.start()

    @property
    def alone(self) -> bool:
        return len(self.place.addresses) == 1

    def close(self) -> None:
        """Leaves the others; they see it."""
        self._open = False
        self._ring()
        if self._watcher.is_alive():
            self._watcher.join()
        self.free_port()
        for connection in self._members.values():
            connection.close()
        self._bell.close()
        self._ear.close()

    def free_port(self) -> None:
        """Gives this worker's port to TensorFlow's server, when all have arrived."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # -- meeting

    def _listen(self) -> socket.socket:
        """Listens on this worker's address, when its name has one: in Kubernetes that may take a while."""
        waiting = _Waiting(self._log)
        while True:
            try:
                return listen(self.place)
            except socket.gaierror as error:
                text = f"an address of {self.place.name()}, which is this one: {reason_of(error)}"
                if waiting.seconds() > self._timeout:
                    raise self._too_late(text) from error
                waiting(text)
                time.sleep(0.5)

    def _gather(self) -> None:
        """The chief's part of the meeting: waits until every other worker has connected."""
        assert self._listener is not None
        waiting, strangers, told = _Waiting(self._log), self._strangers, 0.0
        while missing := self._missing():
            names = ", ".join(map(self.place.name, missing))
            if waiting.seconds() > self._timeout:
                raise self._too_late(names)
            waiting(names)
            sockets = [self._listener, *strangers, *self._members.values()]
            ready = readable(sockets, 0.5)
            if self._listener in ready:
                with contextlib.suppress(OSError):  # it has gone again
                    strangers.append(Connection(self._listener.accept()[0]))
            for connection in [c for c in strangers if c in ready]:
                if self._greet(connection):
                    strangers.remove(connection)
            for connection in [c for c in self._members.values() if c in ready]:
                with contextlib.suppress(Closed):
                    connection.read()
                    continue
                connection.close()
                del self._members[connection.index]
            now = time.monotonic()
            for connection in [*strangers[:-STRANGERS], *(c for c in strangers if now - c.opened > HELLO)]:
                connection.close()
            strangers[:] = [c for c in strangers if c.fileno() >= 0]
            if now - told > HEARTBEAT:
                self._send_to_all(waiting=names)
                told = now
        self._send_to_all(all_here=True)

    def _missing(self) -> list[int]:
        """The workers that are not here. One that is silent counts as such: its machine may have gone, or it connects again."""
        for index, connection in list(self._members.items()):
            if time.monotonic() - connection.heard > 3 * HEARTBEAT:
                connection.close()
                del self._members[index]
        return [i for i in range(1, len(self.place.addresses)) if i not in self._members]

    def _greet(self, connection: Connection) -> bool:
        """Reads a new connection's first message. Returns whether it is settled: a worker, or gone.

        Raises ConfigError, here and there, where the worker has another list of workers.
        """
        try:
            messages = connection.read()
            if not messages:
                return False
            index, addresses = messages[0].get("worker"), messages[0].get("addresses")
            if type(index) is not int or not is_list_of_texts(addresses):
                raise Closed
            ours = list(self.place.addresses)
            if addresses != ours:
                here, there = (", ".join(x)[:300] for x in (ours, addresses))
                error = ConfigError(
                    f"the workers' lists differ: {here} on {self.place.name()}, {there} on worker {index}; give all"
                    " workers the same list, in one order"
                )
                self._send_to_all(error=str(error))
                with contextlib.suppress(Closed):
                    connection.send(error=str(error))
                raise error
            if not 0 < index < len(ours):
                raise Closed
            if index in self._members:
                text = f"there is another {self.place.name(index)} already; give each process an index of its own"
                connection.send(error=text)
                raise Closed
            connection.index = index
            self._members[index] = connection
        except Closed:
            connection.close()
        return True

    def _find_chief(self) -> None:
        """The other workers' part of the meeting: connects to the chief, and waits until all have."""
        waiting, chief = _Waiting(self._log), self.place.name(0)
        connection: Connection | None = None
        whom, told = chief, 0.0
        while True:
            if waiting.seconds() > self._timeout:
                raise self._too_late(whom)
            waiting(whom)
            try:
                if connection is None:
                    connection = Connection(connect(self.place, 0, 2))
                    connection.index = 0
                    self._strangers[:] = [connection]
                    connection.send(worker=self.place.index, addresses=list(self.place.addresses))
                    told = time.monotonic()
                if time.monotonic() - told > HEARTBEAT:
                    connection.send()  # a sign of life
                    told = time.monotonic()
                messages = connection.read() if readable([connection], 0.5) else []
                for i, message in enumerate(messages):
                    if "error" in message:
                        raise ConfigError(str(message["error"]))
                    if "failed" in message:
                        raise LostWorkerError(f"{chief} {_how(message['failed'])}")
                    if message.get("all_here"):
                        self._members[0] = self._strangers.pop()
                        for further in messages[i + 1 :]:  # it may have ended right after
                            self._take(further, 0)
                        return
                    whom = str(message.get("waiting", whom))
                if time.monotonic() - connection.heard > SILENCE:
                    raise Closed
            except (Closed, OSError) as error:
                if connection is not None:
                    connection.close()
                connection = None
                whom = f"{chief}, {reason_of(error)}" if isinstance(error, OSError) else chief
                time.sleep(0.5)

    def _check_reach(self) -> None:
        """Connects once to each other worker, as TensorFlow will, so that a closed firewall has a name."""
        for index in range(len(self.place.addresses)):
            if index in (self.place.index, 0):  # all are connected to the chief
                continue
            try:
                connect(self.place, index, 10).close()
            except OSError as error:
                raise RunError(
                    f"{self.place.name()} cannot reach {self.place.name(index)}: {reason_of(error)}; every worker must"
                    " reach the port of every other: look at the firewall"
                ) from error

    def _too_late(self, names: str) -> RunError:
        return RunError(
            f"{self.place.name()} has waited {self._timeout:g} s for {names}; start all workers, or wait longer with"
            " --cluster_timeout"
        )

    # -- agreeing

    def agree(self, **terms: Any) -> None:
        """Compares `terms` (JSON values) with those of all workers, who wait here for one another.

        Raises:
            ConfigError: on every worker, if something differs: what, both values, and between whom.
            RunError: if a worker has ended.
        """
        if self.alone:
            return
        terms = json.loads(json.dumps(terms))
        waiting, own = _Waiting(self._log), self.place.index
        with self._changed:
            self._round += 1
            now, others = self._round, sorted(self._members)
            self._terms[now, own] = terms
        if own != 0:
            self._send(terms=terms, round=now)
        while True:
            with self._changed:
                missing = [i for i in others if (now, i) not in self._terms] if own == 0 else others
                if now in self._verdicts or not missing:
                    break
                if self.lost:
                    raise self.loss()
                self._changed.wait(0.5)
            waiting(", ".join(map(self.place.name, missing)))
        if own == 0:
            self._verdicts[now] = self._difference(now)
            self._send(verdict=self._verdicts[now], round=now)
        if self._verdicts[now]:
            raise ConfigError(self._verdicts[now])

    def take_from_chief(self, value: str) -> str:
        """The chief's `value`, for which the other workers wait here. Raises RunError if a worker has ended."""
        if self.alone:
            return value
        waiting = _Waiting(self._log)
        with self._changed:
            self._round += 1
            now = self._round
        if self.place.index == 0:
            self._send(order=value, round=now)
            return value
        while True:
            with self._changed:
                if now in self._orders:
                    return self._orders[now]
                if self.lost:
                    raise self.loss()
                self._changed.wait(0.5)
            waiting(self.place.name(0))

    def _difference(self, number: int) -> str:
        """What differs among the workers' terms of a round, in one line; empty where nothing does."""
        ours = flatten(self._terms[number, 0])
        for index in sorted(self._members):
            theirs = flatten(self._terms[number, index])
            names = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
            if names:
                shown = "; ".join(
                    f"{n}: {_short(ours.get(n))} on {self.place.name(0)}, {_short(theirs.get(n))} on"
                    f" {self.place.name(index)}"
                    for n in names[:3]
                )
                more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
                return (
                    f"the workers differ in {shown}{more}; give all workers the same flags, data and versions"
                )
        return ""

    # -- living

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While inside, this worker needs all others: when one is lost, the process ends, wherever it waits."""
        with self._changed:
            self._at_work += 1
            self._since = max(self._since, time.monotonic())
        try:
            yield
        finally:
            self._at_work -= 1

    @contextlib.contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Sends an error that leaves the block to the others, who then know why this worker ends."""
        try:
            yield
        except (RunInterrupted, LostWorkerError):  # all stop together; the others know
            raise
        except BaseException as error:
            if not self.lost and not self.alone:
                self._send(failed=_one_line(error))
            raise

    def notices_loss(self) -> bool:
        """Whether a worker was lost, or is found to be within seconds, when TensorFlow reports a loss: it may know sooner."""
        end = time.monotonic() + 3
        with self._changed:
            while not (self.lost or self.alone) and time.monotonic() < end:
                self._changed.wait(0.2)
                for connection in self._members.values():
                    silent = time.monotonic() - connection.heard
                    if silent > 3 * HEARTBEAT:
                        self._lose(f"{self.place.name(connection.index)} has been silent for {silent:.0f} s")
        return bool(self.lost)

    def loss(self) -> LostWorkerError:
        """The error for a worker that was lost."""
        if self.lost.endswith(MENDED):
            return LostWorkerError(self.lost)
        return LostWorkerError(
            f"{self.lost or 'another worker of the cluster has ended'}; to resume from the last saved state, start all"
            " workers again with the same --workdir"
        )

    def _send(self, **message: Any) -> None:
        """Sends a message to the chief, or from the chief to all, and waits until it is sent.

        What follows may be TensorFlow's own meeting, in which no thread of Python runs: what has not been sent before it
        arrives after it, and the others wait for it.
        """
        with self._changed:
            self._outbox.append(message)
            self._ring()
            while self._outbox and self._watcher.is_alive():
                self._changed.wait(0.1)

    def _ring(self) -> None:
        """Wakes the watching thread."""
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    def _send_to_all(self, **message: Any) -> None:
        for connection in list(self._members.values()):
            with contextlib.suppress(Closed):  # reading finds it closed
                connection.send(**message)

    def _watch(self) -> None:
        """The thread that sends and receives while this process lives."""
        sent = 0.0
        while self._open:
            sockets = [c for c in self._members.values() if c.fileno() >= 0]
            ready = readable([self._ear, *sockets], 0.5)
            if self._ear in ready:
                self._ear.recv(4096)
            with self._changed:
                posted = list(self._outbox)
            for message in posted:
                self._send_to_all(**message)
            with self._changed:
                del self._outbox[: len(posted)]
            now = time.monotonic()
            if now - sent > HEARTBEAT:
                self._send_to_all()
                sent = now
            with self._changed:
                for connection in sockets:
                    self._hear(connection, connection in ready)
                self._changed.notify_all()
            if self.lost and self._at_work and time.monotonic() - self._since > GRACE:
                if sys.stdout is not None:
                    sys.stdout.flush()
                print(f"error: {self.loss()}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread waits in C++ for ever

    def _hear(self, connection: Connection, ready: bool) -> None:
        name = self.place.name(connection.index)
        try:
            for message in connection.read() if ready else ():
                self._take(message, connection.index)
        except Closed:
            connection.close()
            self._lose(f"{name} has ended")
        if time.monotonic() - connection.heard > SILENCE:
            connection.close()
            self._lose(f"{name} has been silent for {SILENCE:g} s")

    def _take(self, message: dict[str, Any], index: int) -> None:
        """Takes in a message of the worker `index`."""
        number = message.get("round")
        if "failed" in message:
            self._lose(f"{self.place.name(index)} {_how(message['failed'])}")
        elif "lost" in message and index == 0:
            self._lose(str(message["lost"]))
        elif (
            "terms" in message
            and number in (self._round, self._round + 1)
            and isinstance(message["terms"], dict)
        ):
            self._terms[number, index] = message["terms"]
        elif "verdict" in message and number == self._round and index == 0:
            self._verdicts[number] = str(message["verdict"])
        elif "order" in message and number in (self._round, self._round + 1) and index == 0:
            self._orders[number] = str(message["order"])

    def _lose(self, text: str) -> None:
        if self.lost:
            return
        self.lost, self._since = text, time.monotonic()
        if self.place.index == 0:
            self._send_to_all(lost=text)


def flatten(values: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"config": {"seed": 0}} becomes {"config.seed": 0}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{start}{name}.")
        else:
            flat[f"{start}{name}"] = value
    return flat


def _how(failed: Any) -> str:
    """How a worker ended, from what it has told of its error."""
    return f"has ended: {failed}" if failed == INTERRUPTED else f"has failed: {failed}{MENDED}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return one_line(error, 500) or type(error).__name__


def _short(value: Any) -> str:
    return "nothing" if value is None else str(value)[:100]
