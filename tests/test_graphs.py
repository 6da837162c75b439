"""Which shapes get a graph, which lose theirs, and what happens when one cannot be recorded: with a recorder of our
own, since a CPU has no graphs. The real ones are in test_cuda.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from paravae.vae.engines.graphs import EAGER, RECORDABLE, RECORDED, Function, GraphCache


class Recorder:
    """Records by remembering the function; fails for tensors of ``too_large`` values."""

    def __init__(self, too_large: int = 1 << 30) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self.too_large = too_large

    def __call__(self) -> Recorded:
        return Recorded(self)


class Recorded:
    """One function, remembered with the calls that it wants repeated."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._repeated: list[Callable[[], None]] = []

    def record(self, function: Function, value: Tensor, working: Sequence[int]) -> None:
        if value.numel() >= self._recorder.too_large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")
        function(value)  # as a graph does, whose kernels do not run yet
        self._recorder.recorded.append(value.numel())
        self._function = function

    def repeat(self, call: Callable[[], None]) -> None:
        self._repeated.append(call)

    def __call__(self, value: Tensor) -> Tensor:
        self._recorder.replayed.append(value.numel())
        for call in self._repeated:
            call()
        return self._function(value)


def cache_with(recorder: Recorder, limit: int = 2) -> GraphCache:
    return GraphCache(limit, new=recorder, can_record=lambda value: True)


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
    for cache in (cache_with(recorder, limit=0), GraphCache(2, new=recorder)):  # the second: CPU tensors
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


def test_a_call_that_is_repeated_is_made_at_every_replay() -> None:
    """What a recording leaves out, such as a collective: made in an eager run, not while recording, then each time."""
    cache, calls = cache_with(Recorder()), []

    def function(x: Tensor) -> Tensor:
        if not cache.repeats(lambda: calls.append("repeated")):
            calls.append("eager" if not cache.recorded else "inside a replay")
        return 2 * x

    for _ in range(4):
        assert torch.equal(cache.run("key", function, torch.ones(2)), 2 * torch.ones(2))
    assert [call for call in calls if call != "inside a replay"] == ["eager", "repeated", "repeated", "repeated"]


def run_together(states: Sequence[int], cache: GraphCache) -> list[int]:
    """One run, in which all agree on the least of ``states`` and what this rank comes with; what it came with."""
    came: list[int] = []

    def agree(state: int) -> int:
        came.append(state)
        return min([state, *states[len(came) - 1 : len(came)]])

    assert torch.equal(cache.run("key", lambda x: 2 * x, torch.ones(3), agree), 2 * torch.ones(3))
    return came


def test_all_replay_or_none() -> None:
    """Ranks record together, and replay only what all have: one that meets a shape later, or fails to record it, keeps
    the others waiting for nothing."""
    recorder = Recorder()
    cache = cache_with(recorder)
    assert run_together([EAGER], cache) == [EAGER]
    assert run_together([EAGER], cache) == [RECORDABLE]  # another rank has not met it
    assert recorder.recorded == []
    assert run_together([RECORDABLE, 1], cache) == [RECORDABLE, True]
    assert run_together([RECORDED], cache) == [RECORDED]
    assert len(recorder.replayed) == 2
    assert run_together([RECORDABLE, 1], cache) == [RECORDED, True]  # another has lost it: all record again
    assert len(recorder.recorded) == 2
    assert run_together([EAGER], cache) == [RECORDED]
    assert run_together([RECORDABLE, 0], cache) == [RECORDED, True]
    assert cache.refused == {"key": "another rank could not record it"}
    assert run_together([], cache) == [EAGER]
