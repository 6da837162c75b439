"""Who is still there: a socket between every two ranks, which the system closes when a process ends, however it ends.

Nothing is sent but a greeting. So a rank that was killed is noticed at once by all others, on this host or another,
while one that is merely slow is not taken for dead.
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


class Presence:
    """The other ranks of a group, as far as their processes live."""

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
            connection.setblocking(False)
        return Presence(sockets, names)

    def gone(self) -> int | None:
        """A rank whose process has ended, or None."""
        ready, _, _ = select.select(list(self._sockets.values()), [], [], 0)
        for rank, connection in self._sockets.items():
            if connection in ready and _is_closed(connection):
                return rank
        return None

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


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
