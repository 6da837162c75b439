"""The ranks of one life of a job find each other, whatever a life before has left in the store."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from paravae.launch import life
from paravae.launch.life import store_of_this_life


def live(store: dist.Store, size: int, late: int) -> str:
    """A life of ``size`` ranks, of which one comes late: what rank 0 tells the others in their part of the store."""

    def rank_lives(rank: int) -> str:
        time.sleep(0.2 if rank == late else 0)
        own = store_of_this_life(store, rank, size)
        if rank == 0:
            assert not own.check(["said"]), "left by a life before"
            own.set("said", str(time.monotonic()))
        return own.get("said").decode()

    with ThreadPoolExecutor(size) as threads:
        (said,) = set(threads.map(rank_lives, range(size)))
    return said


def test_each_life_has_a_part_of_the_store_to_itself() -> None:
    store = dist.HashStore()
    said = [live(store, size, late) for size, late in ((3, 2), (3, 0), (3, 1), (2, 1))]
    assert len(set(said)) == 4


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "_MEETING_S", 0.2)
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come"):
        store_of_this_life(dist.HashStore(), 0, 3)
