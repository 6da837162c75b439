"""Which shapes get a graph, which lose theirs, and what happens when one cannot be recorded: with a recorder of our
own, since a CPU has no graphs. The real ones are in test_cuda.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from paravae.vae.engines.graphs import Function, GraphCache


class Recorder:
    """Records by remembering the function; fails for tensors of ``too_large`` values."""

    def __init__(self, too_large: int = 1 << 30) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self._too_large = too_large

    def __call__(self, function: Function, value: Tensor, working: Sequence[int]) -> Function:
        if value.numel() >= self._too_large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")
        self.recorded.append(value.numel())

        def replay(value: Tensor) -> Tensor:
            self.replayed.append(value.numel())
            return function(value)

        return replay


def cache_with(recorder: Recorder, limit: int = 2) -> GraphCache:
    return GraphCache(limit, record=recorder, can_record=lambda value: True)


def run(cache: GraphCache, size: int, key: object = None) -> None:
    value = torch.arange(size)
    assert torch.equal(cache.run(key or size, lambda x: 2 * x, value), 2 * value)


def test_recorded_at_the_second_use() -> None:
    recorder = Recorder()
    cache = cache_with(recorder)
    run(cache, 3)
    assert (recorder.recorded, recorder.replayed) == ([], [])
    run(cache, 3)
    assert (recorder.recorded, recorder.replayed) == ([3], [3])
    run(cache, 3)
    assert (recorder.recorded, recorder.replayed) == ([3], [3, 3])


def test_the_least_recently_used_is_dropped() -> None:
    recorder = Recorder()
    cache = cache_with(recorder, limit=2)
    for size in (1, 1, 2, 2, 1, 3, 3):
        run(cache, size)
    assert cache.recorded == (1, 3)
    run(cache, 2)  # met for the first time again
    assert cache.recorded == (1, 3)
    run(cache, 2)
    assert cache.recorded == (3, 2)
    assert recorder.recorded == [1, 2, 3, 2]


def test_a_shape_that_does_not_record_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(too_large=10)
    cache = cache_with(recorder)
    with caplog.at_level(logging.WARNING, "paravae"):
        for _ in range(4):
            run(cache, 12)
    assert recorder.recorded == []
    assert cache.recorded == ()
    assert cache.refused == {12: "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."}
    assert len(caplog.records) == 1
    assert "no CUDA graph for [12], it runs eagerly: OutOfMemoryError" in caplog.text
    run(cache, 3)
    run(cache, 3)
    assert cache.recorded == (3,)


def test_an_error_of_the_function_is_not_swallowed() -> None:
    def broken(x: Tensor) -> Tensor:
        raise KeyError("broken on purpose")

    cache = cache_with(Recorder())
    for _ in range(3):
        with pytest.raises(KeyError, match="broken on purpose"):
            cache.run("key", broken, torch.ones(1))


def test_none_are_kept_where_none_are_wanted_or_possible() -> None:
    recorder = Recorder()
    for cache in (cache_with(recorder, limit=0), GraphCache(2, record=recorder)):  # the second: CPU tensors
        for _ in range(3):
            run(cache, 3)
        assert cache.recorded == ()
    assert recorder.recorded == []


def test_clear_forgets_everything() -> None:
    recorder = Recorder()
    cache = cache_with(recorder)
    run(cache, 3)
    run(cache, 3)
    cache.clear()
    assert cache.recorded == ()
    run(cache, 3)
    assert recorder.recorded == [3]


def test_keys_met_once_do_not_pile_up() -> None:
    cache = cache_with(Recorder())
    for size in range(1, 1000):
        run(cache, 1, key=("size", size))
    assert len(cache._seen) <= 256
