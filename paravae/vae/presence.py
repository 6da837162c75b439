"""A line between every two ranks: short rows travel on it, and the system closes it when a process ends, however.

So a rank that was killed is noticed at once by all others, on this host or another, while one that is merely slow is
not taken for dead. And a row takes 20 us, where gloo, which hands its work to threads, takes 250.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

_GREETING = struct.Struct("!16si")  # the listener's secret, the caller's rank
_MEETING_S = 20.0


class GoneError(Exception):
    """The process of ``rank`` has ended."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} is gone")
        self.rank = rank


class Presence:
    """The other ranks of a group, as long as their processes live."""

    def __init__(self, sockets: dict[int, socket.socket], names: Sequence[str]) -> None:
        self._sockets, self._names = sockets, names

    @staticmethod
    def meet(rank: int, size: int, exchange: Callable[[str], Sequence[str]]) -> Presence:
        """Connect every two ranks. ``exchange``: gives every rank's text for this rank's. All ranks call this.

        Raises:
            OSError: another rank cannot be reached.
        """
        with socket.create_server(("", 0), backlog=size) as listener:
            own_secret = os.urandom(16).hex()
            where = f"{_own_address()} {listener.getsockname()[1]} {own_secret}"
            texts = exchange(f"{where} {socket.gethostname()} {os.getpid()}")
            places = [text.split(" ") for text in texts]
            names = [f"process {pid} on {name}" for *_, name, pid in places]
            sockets = {
                other: _call("127.0.0.1" if places[other][3] == places[rank][3] else host, port, secret, rank)
                for other, (host, port, secret, *_) in enumerate(places[:rank])
            }
            sockets.update(_answer(listener, own_secret) for _ in range(rank + 1, size))
        for connection in sockets.values():
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Presence(sockets, names)

    def close(self) -> None:
        """Hang up: the other ranks take this one for gone."""
        for connection in self._sockets.values():
            connection.close()

    def exchange(self, row: bytes) -> dict[int, bytes]:
        """Every other rank's row for this one, all of one length; waits for those that are slow.

        Raises:
            GoneError: a rank has ended instead.
        """
        for rank, connection in self._sockets.items():
            try:
                connection.sendall(row)
            except OSError:
                raise GoneError(rank) from None
        poll, rank_of = select.poll(), {line.fileno(): rank for rank, line in self._sockets.items()}
        for line in self._sockets.values():
            poll.register(line, select.POLLIN)
        rows: dict[int, bytes] = {}
        while len(rows) < len(self._sockets):
            for number, _ in poll.poll():
                rank = rank_of[number]
                rows[rank] = _receive(self._sockets[rank], len(row))
                if len(rows[rank]) < len(row):
                    raise GoneError(rank)
                poll.unregister(number)
        return rows

    def gone(self) -> int | None:
        """A rank whose process has ended, or None."""
        poll, rank_of = select.poll(), {line.fileno(): rank for rank, line in self._sockets.items()}
        for line in self._sockets.values():
            poll.register(line, select.POLLRDHUP)
        return next((rank_of[number] for number, _ in poll.poll(0)), None)

    def name(self, rank: int) -> str:
        """Which process ``rank`` is."""
        return self._names[rank]


def _own_address() -> str:
    """This host's address on the way to where the ranks meet."""
    meeting_place = os.environ.get("MASTER_ADDR", "")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((meeting_place, 1))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


def _call(host: str, port: str, secret: str, rank: int) -> socket.socket:
    connection = socket.create_connection((host, int(port)), timeout=_MEETING_S)
    connection.sendall(_GREETING.pack(bytes.fromhex(secret), rank))
    return connection


def _answer(listener: socket.socket, secret: str) -> tuple[int, socket.socket]:
    """The next rank that calls, and the socket to it; strangers are turned away."""
    deadline = time.monotonic() + _MEETING_S
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        connection, _ = listener.accept()
        connection.settimeout(left)
        greeting = connection.recv(_GREETING.size, socket.MSG_WAITALL)
        if len(greeting) == _GREETING.size and greeting[:16] == bytes.fromhex(secret):
            return _GREETING.unpack(greeting)[1], connection
        connection.close()
    raise TimeoutError(f"a rank did not call within {_MEETING_S:g} s")


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes; fewer if the other end is closed before."""
    try:
        return connection.recv(size, socket.MSG_WAITALL)
    except OSError:
        return b""
