"""The lines between ranks: who may have one, what travels on them, and who is taken for gone."""

from __future__ import annotations

import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from paravae.vae import presence
from paravae.vae.presence import GoneError, Presence

ROW = 16


def meet(size: int, between: Callable[[list[str]], None] = lambda texts: None) -> list[Presence]:
    """Every rank's end, the ranks being threads; ``between``: is given what they tell each other before they call."""
    texts = [""] * size
    all_told, may_call = threading.Barrier(size), threading.Barrier(size)

    def rank_meets(rank: int) -> Presence:
        def exchange(text: str) -> list[str]:
            texts[rank] = text
            if all_told.wait() == 0:
                between(texts)
            may_call.wait()
            return texts

        return Presence.meet(rank, size, exchange)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank_meets, range(size)))


@pytest.fixture
def three() -> Iterator[list[Presence]]:
    ends = meet(3)
    yield ends
    for end in ends:
        end.close()


def row(text: str) -> bytes:
    return text.encode().ljust(ROW, b".")


def soon(value: Callable[[], object], wanted: object) -> bool:
    deadline = time.monotonic() + 5
    while value() != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return value() == wanted


def test_every_rank_has_the_rows_of_all_others(three: list[Presence]) -> None:
    with ThreadPoolExecutor(3) as threads:
        for turn in range(20):
            jobs = [threads.submit(end.exchange, row(f"{turn} of {rank}")) for rank, end in enumerate(three)]
            for rank, job in enumerate(jobs):
                assert job.result() == {other: row(f"{turn} of {other}") for other in {0, 1, 2} - {rank}}
    assert [end.gone() for end in three] == [None] * 3
    assert three[0].name(2) == f"process {os.getpid()} on {socket.gethostname()}"


def test_one_that_ends_is_gone_for_all_others_and_no_one_else_is(three: list[Presence]) -> None:
    three[1].close()
    assert soon(three[0].gone, 1)
    assert soon(three[2].gone, 1)
    for end in (three[0], three[2]):
        with pytest.raises(GoneError) as caught:
            end.exchange(row("anyone?"))
        assert caught.value.rank == 1


def test_what_it_sent_before_it_ended_is_still_had(three: list[Presence]) -> None:
    """A rank may end as soon as it has what it needs; those who are slower lack nothing."""
    with ThreadPoolExecutor(3) as threads:
        quick = threads.submit(lambda: (three[1].exchange(row("my last")), three[1].close()))
        others = [threads.submit(three[rank].exchange, row("and mine")) for rank in (0, 2)]
        quick.result()
        assert [job.result()[1] for job in others] == [row("my last")] * 2
    assert soon(three[0].gone, 1)


def test_the_last_row_tells_why_and_waits(three: list[Presence]) -> None:
    three[1].close()
    assert soon(three[2].gone, 1)
    three[2].lose(1, row("1 has ended"))
    three[2].close()
    assert soon(lambda: three[0].last_row(2, ROW), row("1 has ended"))
    assert three[0].last_row(2, ROW) == row("1 has ended"), "it is only looked at"
    assert three[0].last_row(1, ROW) == b""


def test_who_was_lost_first_stays_the_one(three: list[Presence]) -> None:
    three[0].lose(2, row("2 has ended"))
    three[1].close()
    assert three[0].gone() == 2
    with pytest.raises(GoneError) as caught:
        three[0].exchange(row("anyone?"))
    assert caught.value.rank == 2


def test_strangers_are_turned_away_and_keep_nobody_waiting() -> None:
    """One without the secret, one that says too little, one that says nothing, one that hangs up rudely."""
    strangers: list[socket.socket] = []

    def call_rank_0(texts: list[str]) -> None:
        port = int(texts[0].split(" ")[1])
        wrong = struct.pack("!16si", b"not the secret..", 1)
        for words in (wrong, b"hello", b"", wrong):
            strangers.append(socket.create_connection(("127.0.0.1", port)))
            strangers[-1].sendall(words)
        strangers[-1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        strangers.pop().close()

    started = time.monotonic()
    ends = meet(3, call_rank_0)
    assert time.monotonic() - started < 4
    with ThreadPoolExecutor(3) as threads:
        rows = list(threads.map(lambda rank: ends[rank].exchange(row(str(rank))), range(3)))
    assert rows[0] == {1: row("1"), 2: row("2")}
    for stranger in strangers:
        stranger.settimeout(5)
        assert _hung_up(stranger)
        stranger.close()
    for end in ends:
        end.close()


def _hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_one_that_does_not_call_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_MEETING_S", 0.3)
    text = f"127.0.0.1 1 {'00' * 16} elsewhere 7"
    with pytest.raises(TimeoutError, match="1 of the ranks did not call within"):
        Presence.meet(0, 2, lambda own: [own, text])


def test_one_that_cannot_be_called_is_an_os_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        Presence.meet(1, 2, lambda own: [f"127.0.0.1 {port} {'00' * 16} elsewhere 7", own])


def test_a_child_that_was_forked_and_lives_on_holds_no_line_open() -> None:
    first, second = meet(2)
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    try:
        first.close()
        assert soon(second.gone, 0)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        second.close()


def test_a_process_with_thousands_of_files_open_has_lines_too() -> None:
    """select() takes no file number above 1023, and raises."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"no more than {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        first, second = meet(2)
        with ThreadPoolExecutor(2) as threads:
            job = threads.submit(first.exchange, row("a"))
            assert second.exchange(row("b")) == {0: row("a")}
            assert job.result() == {1: row("b")}
        first.close()
        assert soon(second.gone, 0)
        second.close()
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_loopback_address_is_not_told_to_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for meeting_place in ("127.0.0.1", "", "no such host"):
        monkeypatch.setenv("MASTER_ADDR", meeting_place)
        assert presence._own_address() == socket.gethostname()
    monkeypatch.delenv("MASTER_ADDR")
    assert presence._own_address() == socket.gethostname()


def test_a_host_that_says_nothing_any_more_is_asked(three: list[Presence]) -> None:
    """The system's own questions are on: that they find a host without power cannot be tried here."""
    lines = [line for end in three for line in end._sockets.values()]
    assert len(lines) == 6
    assert all(line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for line in lines)
    assert all(line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2 for line in lines)
