"""The workers of one run: who they are, how they meet, what must agree among them, and whether they live.

TensorFlow's strategy waits for the other workers in C++, where no signal handler, and no other thread of Python, can run.
So the workers meet here first, in Python. Worker 0 listens on its own address and the others connect to it. They keep these
connections, compare what must be equal, and send a heartbeat, so that nobody waits for a worker that is frozen or gone.

Messages are lines of JSON of limited length; nothing that arrives is executed. There is no password, as TensorFlow's server
has none: workers belong in a private network. Imports no TensorFlow.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from . import __version__
from .errors import ConfigError, RunError, RunInterrupted, reason_of
from .files import parse_json

TIMEOUT = 600.0  # seconds that workers wait for one another before the run gives up
HEARTBEAT = 2.0  # seconds between two signs of life
SILENCE = 45.0  # seconds without one, after which a worker counts as lost
GRACE = 5.0  # seconds in which the main thread may end by itself after a worker was lost
SPEAK, REPEAT = 2.0, 30.0  # seconds of waiting until it is printed, and until it is printed again
CONNECT = 40.0  # seconds that TensorFlow's servers get to find one another
HELLO = 10.0  # seconds in which a new connection must name its worker
LONGEST = 2**20  # bytes of a message
STRANGERS = 64  # connections that have not named their worker yet
EXAMPLE = '{"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, "task": {"type": "worker", "index": 0}}'

Log = Callable[[str], None]


# ---- who the workers are ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """This process's place among the workers.

    Attributes:
        addresses: HOST:PORT of all workers; the first is the chief's, who writes the run's files.
        index: this worker's, from 0.
    """

    addresses: tuple[str, ...]
    index: int

    def name(self, index: int | None = None) -> str:
        """A worker for people, as in "worker 1 (10.0.0.2:5000)"; None: this one."""
        index = self.index if index is None else index
        return f"worker {index} ({self.addresses[index]})"


def place_of(addresses: Sequence[str], index: int, where: str) -> Place:
    """Checks a list of workers. `where` names it in errors. Raises ConfigError."""
    for address in addresses:
        _host_and_port(address, where)
    for i, address in enumerate(addresses):
        if address in addresses[:i]:
            raise ConfigError(
                f"{where} names {address} twice; allowed: an address of its own for each worker"
            )
    if not 0 <= index < len(addresses):
        raise ConfigError(
            f"the worker index is {index}, but {where} names {len(addresses)} worker(s); allowed: from 0 to"
            f" {len(addresses) - 1}"
        )
    return Place(tuple(addresses), index)


def place_in_tf_config() -> Place | None:
    """The place that TF_CONFIG gives to this process; None where it is not set, empty or {}. Raises ConfigError."""
    text = os.environ.get("TF_CONFIG") or "{}"

    def wrong(what: str) -> ConfigError:
        return ConfigError(
            f"TF_CONFIG is {text[:200]!r}: {what}; allowed: JSON with 'cluster' and 'task', as {EXAMPLE}, or nothing"
        )

    try:
        config = parse_json(text)
    except ValueError as error:
        raise wrong("it is not JSON") from error
    if config == {}:
        return None
    if not isinstance(config, dict) or not isinstance(config.get("cluster"), dict) or not config["cluster"]:
        raise wrong("it has no 'cluster' with lists of addresses")
    cluster, task = config["cluster"], config.get("task")
    if not isinstance(task, dict) or not {"type", "index"} <= set(task):
        raise wrong(
            "it has no 'task' with 'type' and 'index', which say which of the workers this process is"
        )
    for job in (*cluster, task["type"]):
        if job not in ("chief", "worker"):
            raise wrong(
                f"it has the task type {job!r}; 'chief' and 'worker' work here (parameter servers do not work with Keras 3,"
                " and a run evaluates by itself)"
            )
    if not all(_is_list_of_texts(addresses) for addresses in cluster.values()):
        raise wrong("each task type of 'cluster' needs a list of HOST:PORT")
    if len(cluster.get("chief", [""])) != 1:
        raise wrong("a cluster has one chief, or none")
    if type(task["index"]) is not int:
        raise wrong(f"the index is {task['index']!r}, not an integer")
    own = cluster.get(task["type"], [])
    if not 0 <= task["index"] < len(own):
        raise wrong(f"the index is {task['index']}, but 'cluster' lists {len(own)} of type {task['type']!r}")
    first = len(cluster.get("chief", ())) if task["type"] == "worker" else 0
    addresses = [*cluster.get("chief", ()), *cluster.get("worker", ())]
    return place_of(addresses, first + task["index"], "TF_CONFIG")


def set_tf_config(addresses: Sequence[str], index: int, where: str) -> str:
    """TF_CONFIG for a worker, as JSON. Raises ConfigError on a wrong list; `where` names it."""
    place = place_of(addresses, index, where)
    cluster = {"worker": list(place.addresses)}
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": place.index}})


def _is_list_of_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _host_and_port(address: str, where: str) -> tuple[str, int]:
    """The two parts of HOST:PORT, where HOST may be an IPv6 address in brackets. Raises ConfigError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})", address)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ConfigError(
            f"{where} names the address {address!r}; allowed: HOST:PORT with a port from 1 to 65535, as 10.0.0.1:5000"
        )
    return match[1] or match[2], int(match[3])


# ---- messages ---------------------------------------------------------------------------------------------


class LostWorkerError(RunError):
    """Another worker of the cluster has ended, or is frozen."""


class _Closed(Exception):
    """The other side has ended, or sends what no worker sends."""


class _Connection:
    """Lines of JSON over a socket."""

    def __init__(self, own: socket.socket):
        own.settimeout(
            5
        )  # to send; the messages are short, so it blocks only if the other side has stopped reading
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.index = own, -1
        self.heard = self.opened = time.monotonic()
        self._rest = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Raises _Closed where nobody takes it."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise _Closed from error

    def read(self) -> list[dict[str, Any]]:
        """The messages that have arrived. Raises _Closed."""
        if not _ready([self], 0):
            return []
        try:
            part = self.socket.recv(2**16)
        except OSError as error:
            raise _Closed from error
        *lines, self._rest = (self._rest + part).split(b"\n")
        if not part or len(self._rest) > LONGEST:
            raise _Closed
        self.heard = time.monotonic()
        try:
            messages = [parse_json(line) for line in lines]
        except ValueError as error:
            raise _Closed from error
        if not all(isinstance(message, dict) for message in messages):
            raise _Closed
        return messages

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


def _listen(place: Place) -> socket.socket:
    """A socket that listens on this worker's own address, until TensorFlow needs the port.

    Raises ConfigError, or gaierror where its name has no address.
    """
    host, port = _host_and_port(place.addresses[place.index], "the cluster")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        others = {_host_and_port(other, "the cluster")[0] for other in place.addresses} - {host}
        if others and str(address[0]).startswith("127.") and not host.startswith("127."):
            address = ("", port)  # some systems give their own name to loopback only
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
        return listener
    except socket.gaierror:
        raise
    except OSError as error:
        how = {
            errno.EADDRINUSE: "another process uses the port, perhaps another worker with the same index",
            errno.EADDRNOTAVAIL: "it is no address of this machine; is the worker's index right?",
        }.get(error.errno or 0, reason_of(error))
        raise ConfigError(
            f"{place.name()} cannot listen on its address: {how}; allowed: each worker on the machine and port of its own"
            " entry"
        ) from error


def _connect(place: Place, index: int, timeout: float) -> socket.socket:
    """A connection to another worker's address. Raises OSError."""
    host, port = _host_and_port(place.addresses[index], "the cluster")
    found = socket.create_connection((host, port), timeout)
    if found.getsockname() == found.getpeername():  # where nobody listens, a socket may meet itself
        found.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return found


def _ready(connections: Sequence[Any], seconds: float) -> list[Any]:
    """Those of `connections` and sockets that have something to read, within so many seconds."""
    poll, by_number = select.poll(), {c.fileno(): c for c in connections}  # `select` fails above 1,023 files
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(1000 * seconds)]


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


# ---- the team ---------------------------------------------------------------------------------------------


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
        self._members: dict[int, _Connection] = {}  # of the chief: all others; of another worker: the chief
        self._changed = threading.Condition()
        self._terms: dict[tuple[int, int], dict[str, Any]] = {}  # by round and worker
        self._verdicts: dict[int, str] = {}  # by round; empty: all agree
        self._orders: dict[int, str] = {}  # by round: what the chief has decided for all
        self._outbox: list[dict[str, Any]] = []
        self._round = self._at_work = 0
        self._since = 0.0  # when a worker was lost, or work began after that
        self._listener: socket.socket | None = None
        self._strangers: list[_Connection] = []  # that have not named their worker, or not met the others
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
                return _listen(self.place)
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
        while missing := [i for i in range(1, len(self.place.addresses)) if i not in self._members]:
            names = ", ".join(map(self.place.name, missing))
            if waiting.seconds() > self._timeout:
                raise self._too_late(names)
            waiting(names)
            sockets = [self._listener, *strangers, *self._members.values()]
            ready = _ready(sockets, 0.5)
            if self._listener in ready:
                with contextlib.suppress(OSError):  # it has gone again
                    strangers.append(_Connection(self._listener.accept()[0]))
            for connection in [c for c in strangers if c in ready]:
                if self._greet(connection):
                    strangers.remove(connection)
            for connection in [c for c in self._members.values() if c in ready]:
                with contextlib.suppress(_Closed):
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

    def _greet(self, connection: _Connection) -> bool:
        """Reads a new connection's first message. Returns whether it is settled: a worker, or gone.

        Raises ConfigError, here and there, where the worker has another list of workers.
        """
        try:
            messages = connection.read()
            if not messages:
                return False
            index, addresses = messages[0].get("worker"), messages[0].get("addresses")
            if type(index) is not int or not _is_list_of_texts(addresses):
                raise _Closed
            ours = list(self.place.addresses)
            if addresses != ours:
                here, there = (", ".join(x)[:300] for x in (ours, addresses))
                error = ConfigError(
                    f"the workers' lists differ: {here} on {self.place.name()}, {there} on worker {index}; give all"
                    " workers the same list, in one order"
                )
                self._send_to_all(error=str(error))
                with contextlib.suppress(_Closed):
                    connection.send(error=str(error))
                raise error
            if not 0 < index < len(ours):
                raise _Closed
            if index in self._members:
                text = f"there is another {self.place.name(index)} already; give each process an index of its own"
                connection.send(error=text)
                raise _Closed
            connection.index = index
            self._members[index] = connection
        except _Closed:
            connection.close()
        return True

    def _find_chief(self) -> None:
        """The other workers' part of the meeting: connects to the chief, and waits until all have."""
        waiting, chief = _Waiting(self._log), self.place.name(0)
        connection: _Connection | None = None
        whom = chief
        while True:
            if waiting.seconds() > self._timeout:
                raise self._too_late(whom)
            waiting(whom)
            try:
                if connection is None:
                    connection = _Connection(_connect(self.place, 0, 2))
                    connection.index = 0
                    self._strangers[:] = [connection]
                    connection.send(worker=self.place.index, addresses=list(self.place.addresses))
                for message in connection.read() if _ready([connection], 0.5) else ():
                    if "error" in message:
                        raise ConfigError(str(message["error"]))
                    if "failed" in message:
                        raise LostWorkerError(f"{chief} has ended: {message['failed']}")
                    if message.get("all_here"):
                        self._members[0] = self._strangers.pop()
                        return
                    whom = str(message.get("waiting", whom))
                if time.monotonic() - connection.heard > SILENCE:
                    raise _Closed
            except (_Closed, OSError) as error:
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
                _connect(self.place, index, 10).close()
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
            self._post(terms=terms, round=now)
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
            self._post(verdict=self._verdicts[now], round=now)
        if self._verdicts[now]:
            self._flush()
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
            self._post(order=value, round=now)
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
                self._post(failed=_one_line(error))
                self._flush()
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
        return LostWorkerError(
            f"{self.lost or 'another worker of the cluster has ended'}; to resume from the last saved state, start all"
            " workers again with the same --workdir"
        )

    def _post(self, **message: Any) -> None:
        """Sends a message to the chief, or from the chief to all."""
        with self._changed:
            self._outbox.append(message)
        self._ring()

    def _ring(self) -> None:
        """Wakes the watching thread."""
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    def _flush(self) -> None:
        """Waits, at most two seconds, until what was posted is sent."""
        end = time.monotonic() + 2
        with self._changed:
            while self._outbox and time.monotonic() < end:
                self._changed.wait(0.1)

    def _send_to_all(self, **message: Any) -> None:
        for connection in list(self._members.values()):
            with contextlib.suppress(_Closed):  # reading finds it closed
                connection.send(**message)

    def _watch(self) -> None:
        """The thread that sends and receives while this process lives."""
        sent = 0.0
        while self._open:
            sockets = [c for c in self._members.values() if c.fileno() >= 0]
            ready = _ready([self._ear, *sockets], 0.5)
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

    def _hear(self, connection: _Connection, ready: bool) -> None:
        name = self.place.name(connection.index)
        try:
            for message in connection.read() if ready else ():
                self._take(message, connection.index)
        except _Closed:
            connection.close()
            self._lose(f"{name} has ended")
        if time.monotonic() - connection.heard > SILENCE:
            connection.close()
            self._lose(f"{name} has been silent for {SILENCE:g} s")

    def _take(self, message: dict[str, Any], index: int) -> None:
        """Takes in a message of the worker `index`."""
        number = message.get("round")
        if "failed" in message:
            self._lose(f"{self.place.name(index)} has ended: {message['failed']}")
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
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{start}{name}.")
        else:
            flat[f"{start}{name}"] = value
    return flat


def _one_line(error: BaseException) -> str:
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    return " ".join(text.split())[:500] or type(error).__name__


def _short(value: Any) -> str:
    return "nothing" if value is None else str(value)[:100]


_team: Team | None = None  # a process belongs to one cluster, as TensorFlow allows one server a process


def join_workers(requested: str, timeout: float = TIMEOUT, log: Log = print) -> Team | None:
    """Meets the other workers of the cluster in TF_CONFIG, once in a process, and compares versions with theirs.

    Args:
        requested: the strategy: "multi_worker", or "auto", which is that where there is a cluster.
        timeout: seconds to wait for the others.
        log: prints whom this worker waits for.

    Returns:
        The team; None where there is no cluster, or the strategy is one of a single process.
    Raises:
        ConfigError: if multi_worker finds no cluster, TF_CONFIG is wrong, or the workers differ.
        RunError: if the others do not come, or have ended.
    """
    global _team
    if requested not in ("auto", "multi_worker"):
        return None
    if _team is None:
        place = place_in_tf_config()
        if place is None and requested == "multi_worker":
            raise ConfigError(
                "strategy multi_worker found no cluster; set TF_CONFIG to JSON with 'cluster' (worker addresses) and"
                " 'task' (type and index) in every process, or use --workers and --worker_index, or --strategy=mirrored"
                " for the GPUs of one machine"
            )
        if place is None:
            return None
        _team = Team(place, timeout, log)
        packages = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy")}
        python = ".".join(platform.python_version_tuple()[:2])
        _team.agree(**{"cifar10-trainer": __version__, "Python": python, **packages})
    return _team


def team() -> Team | None:
    """What `join_workers` has found in this process."""
    return _team


# ---- TensorFlow's own meeting -----------------------------------------------------------------------------

_GUARD = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    print("error:", sys.argv[3], file=sys.stderr, flush=True)
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


@contextlib.contextmanager
def connecting_servers(place: Place) -> Iterator[None]:
    """Bounds the time in which TensorFlow's servers find one another. Python stands still meanwhile.

    All workers have just met, so this takes a moment; unless one of them dies in it. A process beside this one ends it after
    CONNECT seconds then. Ctrl-C ends it at once. TensorFlow replaces the handler of SIGTERM; at the end it is put back.
    """
    text = f"{place.name()}: TensorFlow's servers have not found one another in {CONNECT:g} s; start all workers again"
    words = [sys.executable, "-S", "-c", _GUARD, str(os.getpid()), str(CONNECT), text]
    before: dict[signal.Signals, Any] = {}
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                for number in (signal.SIGTERM, signal.SIGINT):
                    before[number] = signal.signal(number, signal.SIG_DFL)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
            assert guard.stdin is not None
            guard.stdin.close()  # it ends
