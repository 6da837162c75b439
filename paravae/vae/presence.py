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
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

_GREETING = struct.Struct("!16si")  # the listener's secret, the caller's rank
_MEETING_S = 8.0
_HUNG_UP = getattr(select, "POLLRDHUP", select.POLLHUP)  # Linux tells of the other end even while data waits
_KEEP_ALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}  # seconds, seconds, times: gone after 8 s
_MOST_WAITING = 1 << 16  # bytes of rows that nobody has taken yet


class GoneError(Exception):
    """The process of ``rank`` has ended."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} is gone")
        self.rank = rank


class Presence:
    """The other ranks of a group, as long as their processes live."""

    def __init__(self, sockets: dict[int, socket.socket], names: Sequence[str]) -> None:
        self._sockets, self._names = sockets, names
        self._lost: int | None = None
        _presences.add(self)

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
            sockets.update(_answers(listener, own_secret, size - rank - 1))
        for connection in sockets.values():
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(connection)
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
        if self._lost is not None:
            raise GoneError(self._lost)
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
        if self._lost is not None:
            return self._lost
        poll, rank_of = select.poll(), {line.fileno(): rank for rank, line in self._sockets.items()}
        for line in self._sockets.values():
            poll.register(line, _HUNG_UP)
        return next((rank_of[number] for number, _ in poll.poll(0)), None)

    def last_row(self, rank: int, size: int) -> bytes:
        """The last of the rows of ``size`` that have come from ``rank`` and not been taken, if any; it stays there."""
        try:
            waiting = self._sockets[rank].recv(_MOST_WAITING, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return b""
        whole = len(waiting) - len(waiting) % size
        return waiting[max(0, whole - size) : whole]

    def lose(self, rank: int, row: bytes) -> None:
        """Go by it that ``rank`` is gone: there are no exchanges any more. ``row``: tells the others, in place of the
        next that they would have had from here."""
        self._lost = rank
        for connection in self._sockets.values():
            with suppress(OSError):
                connection.send(row, socket.MSG_DONTWAIT)

    def name(self, rank: int) -> str:
        """Which process ``rank`` is."""
        return self._names[rank]


_presences: weakref.WeakSet[Presence] = weakref.WeakSet()


def _let_go() -> None:
    """In a process that was forked: a line stays open as long as any process holds it, and this one may live on."""
    for presence in _presences:
        presence.close()


os.register_at_fork(after_in_child=_let_go)


def _keep_alive(connection: socket.socket) -> None:
    """Have the system ask the other host from time to time: one that lost power or network closes no socket."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _own_address() -> str:
    """This host's address on the way to where the ranks meet; its name, where that is not one for other hosts."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ.get("MASTER_ADDR", ""), 1))  # sends nothing
            address = str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
    return socket.gethostname() if address.startswith("127.") else address


def _call(host: str, port: str, secret: str, rank: int) -> socket.socket:
    connection = socket.create_connection((host, int(port)), timeout=_MEETING_S)
    connection.sendall(_GREETING.pack(bytes.fromhex(secret), rank))
    return connection


def _answers(listener: socket.socket, secret: str, count: int) -> dict[int, socket.socket]:
    """The sockets of the ``count`` ranks that are to call, by rank. Strangers are turned away; those that say nothing
    keep nobody waiting."""
    deadline = time.monotonic() + _MEETING_S
    poll, callers = select.poll(), {}
    poll.register(listener, select.POLLIN)
    known: dict[int, socket.socket] = {}
    try:
        while len(known) < count:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1e3)
            if not ready:
                raise TimeoutError(f"{count - len(known)} of the ranks did not call within {_MEETING_S:g} s")
            for number, _ in ready:
                if number == listener.fileno():
                    caller, _ = listener.accept()
                    callers[caller.fileno()] = caller
                    poll.register(caller, select.POLLIN)
                    continue
                greeting = _receive(callers[number], _GREETING.size, socket.MSG_DONTWAIT)
                poll.unregister(number)
                if len(greeting) == _GREETING.size and greeting[:16] == bytes.fromhex(secret):
                    known[_GREETING.unpack(greeting)[1]] = callers.pop(number)
                else:
                    callers.pop(number).close()
        return known
    finally:
        for caller in callers.values():
            caller.close()


def _receive(connection: socket.socket, size: int, how: int = socket.MSG_WAITALL) -> bytes:
    """So many bytes; fewer if the other end is closed before."""
    try:
        return connection.recv(size, how)
    except OSError:
        return b""
