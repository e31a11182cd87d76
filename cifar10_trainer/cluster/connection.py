"""Messages between two workers: lines of JSON of limited length over a socket. Nothing that arrives is executed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, reason_of
from ..files import parse_json
from .place import Place, host_and_port

LONGEST = 2**20  # bytes of a message


class Closed(Exception):
    """The other side has ended, or sends what no worker sends."""


class Connection:
    """Lines of JSON over a socket."""

    def __init__(self, own: socket.socket):
        # To send. The messages are short, so it blocks only if the other side has stopped reading.
        own.settimeout(5)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.index = own, -1
        self.heard = self.opened = time.monotonic()
        self._rest = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Raises Closed where nobody takes it."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Closed from error

    def read(self) -> list[dict[str, Any]]:
        """The messages that have arrived. Raises Closed."""
        if not readable([self], 0):
            return []
        try:
            part = self.socket.recv(2**16)
        except OSError as error:
            raise Closed from error
        *lines, self._rest = (self._rest + part).split(b"\n")
        if not part or len(self._rest) > LONGEST:
            raise Closed
        self.heard = time.monotonic()
        try:
            messages = [parse_json(line) for line in lines]
        except ValueError as error:
            raise Closed from error
        if not all(isinstance(message, dict) for message in messages):
            raise Closed
        return messages

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


def listen(place: Place) -> socket.socket:
    """A socket that listens on this worker's own address, until TensorFlow needs the port.

    Raises ConfigError, or gaierror where its name has no address.
    """
    host, port = host_and_port(place.addresses[place.index], "the cluster")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        others = {host_and_port(other, "the cluster")[0] for other in place.addresses} - {host}
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


def connect(place: Place, index: int, timeout: float) -> socket.socket:
    """A connection to another worker's address. Raises OSError."""
    host, port = host_and_port(place.addresses[index], "the cluster")
    found = socket.create_connection((host, port), timeout)
    if found.getsockname() == found.getpeername():  # where nobody listens, a socket may meet itself
        found.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return found


def readable(connections: Sequence[Any], seconds: float) -> list[Any]:
    """Those of `connections` and sockets that have something to read, within so many seconds."""
    poll, by_number = select.poll(), {c.fileno(): c for c in connections}  # `select` fails above 1,023 files
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(1000 * seconds)]
