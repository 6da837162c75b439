"""CUDA graphs by shape: recorded at the second use, replayed from then on, the least recently used dropped."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger("paravae")

Function = Callable[[Tensor], Tensor]
Agree = Callable[[int], int]
"""Gives the least of the numbers that all who make this call together came with: alone, one's own."""

EAGER, RECORDABLE, RECORDED = 0, 1, 2
"""What can be done with a key, in an order in which the least of all ranks' is what all can do."""

_SEEN_LIMIT = 256  # keys remembered without a graph: those met once, and those that would not record


class Recording(Protocol):
    """A function recorded for one shape."""

    def record(self, function: Function, value: Tensor, working: Sequence[int]) -> None:
        """Record ``function``, which may call ``repeat``. ``working``: bytes of the largest tensors that it holds."""
        ...

    def repeat(self, call: Callable[[], None]) -> None:
        """Leave ``call`` out of what is being recorded, to be made here at every replay."""
        ...

    def __call__(self, value: Tensor) -> Tensor:
        """Replay it with another value."""
        ...


class CudaGraph:
    """``function`` recorded as CUDA graphs, with memory of their own for input, result and all between.

    One graph, and where the function has collectives one before, between and after them: a communicator of NCCL's that
    is part of a graph cannot be given up while the graph lives, and a process that tries hangs. The host queues graphs
    and collectives far ahead of the GPU, so this costs nothing.

    A replay waits for the one before, on whatever stream that was, and hands out a copy of the result.
    """

    def __init__(self) -> None:
        self._parts: list[Callable[[], object]] = []
        self._done = torch.cuda.Event()
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Function, value: Tensor, working: Sequence[int]) -> None:
        """The memory of ``working``, taken beforehand, serves smaller tensors too; taken as they come, each size would
        keep memory of its own, twice as much in all."""
        self._input = value.clone()
        stream = _recording_stream(value.device)
        torch.cuda.synchronize(value.device)
        gc.collect()  # a graph that is collected while another is recorded spoils that
        torch.cuda.empty_cache()
        with torch.cuda.stream(stream):
            self._begin()
            try:
                taken = [torch.empty(size, dtype=torch.uint8, device=value.device) for size in working]
                del taken  # to the graph's own pool
                self._output = function(self._input)
            finally:
                self._end()
        self._done.record()

    def _begin(self) -> None:
        self._open = torch.cuda.CUDAGraph()
        # thread_local: other threads (NCCL's watchdog) may call CUDA meanwhile.
        self._open.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # between two collectives, say
            self._open.capture_end()
        self._parts.append(self._open.replay)

    def repeat(self, call: Callable[[], None]) -> None:
        self._end()
        self._parts.append(call)
        self._begin()

    def __call__(self, value: Tensor) -> Tensor:
        stream = torch.cuda.current_stream(value.device)
        stream.wait_event(self._done)
        self._input.copy_(value)
        for part in self._parts:
            part()
        result = self._output.clone()
        self._done.record(stream)
        return result


class GraphCache:
    """At most ``limit`` recorded graphs; 0 records none, and every call runs eagerly."""

    def __init__(
        self,
        limit: int,
        new: Callable[[], Recording] = CudaGraph,
        can_record: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self._limit, self._new, self._can_record = limit, new, can_record or _on_a_free_stream
        self._graphs: OrderedDict[Hashable, Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, str | None] = OrderedDict()  # why it is not recorded, None: not tried yet
        self._lock = threading.Lock()
        self._under_way = threading.local()  # .recording: what this thread records

    @property
    def recorded(self) -> tuple[Hashable, ...]:
        """The keys that have a graph, least recently used first."""
        return tuple(self._graphs)

    @property
    def refused(self) -> dict[Hashable, str]:
        """The keys that run eagerly because recording failed, and why."""
        return {key: reason for key, reason in self._seen.items() if reason is not None}

    def clear(self) -> None:
        """Drop every graph and give its memory back."""
        with self._lock:
            self._seen.clear()
            if self._graphs:
                self._graphs.clear()
                _return_memory()

    def run(
        self,
        key: Hashable,
        function: Function,
        value: Tensor,
        agree: Agree = lambda state: state,
        working: Callable[[], Sequence[int]] = tuple,
    ) -> Tensor:
        """``function(value)``; ``key`` names everything but the values in ``value`` that the result depends on.

        ``agree``: see ``engines.base``; all who share the work do alike, and replay only what all have recorded.
        ``working``: asked, if a graph is recorded, for the bytes of the largest tensors held at once.
        """
        with self._lock:
            state = agree(self._state(key, value))
            if state == RECORDABLE and not agree(self._try_to_record(key, function, value, working())):
                self._refuse(key, "another rank could not record it")
                state = EAGER
            if state != EAGER:
                self._graphs.move_to_end(key)
                return self._graphs[key](value)
            if self._limit and key not in self._graphs:
                self._seen.setdefault(key, None)
            if len(self._seen) > _SEEN_LIMIT:
                self._seen.popitem(last=False)
        return function(value)

    def _state(self, key: Hashable, value: Tensor) -> int:
        if self._limit == 0 or not self._can_record(value):
            return EAGER
        if key in self._graphs:
            return RECORDED
        return RECORDABLE if key in self._seen and self._seen[key] is None else EAGER

    def _try_to_record(self, key: Hashable, function: Function, value: Tensor, working: Sequence[int]) -> bool:
        self._graphs.pop(key, None)  # where another rank has none, all record it
        while len(self._graphs) >= self._limit:
            self._graphs.popitem(last=False)
            _return_memory()
        recording = self._under_way.recording = self._new()
        try:
            recording.record(function, value, working)
        except RuntimeError as error:  # out of memory among them
            del recording  # and its memory, which is then returned
            self._under_way.recording = None
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            logger.warning("no CUDA graph for %s, it runs eagerly: %s", list(value.shape), reason)
            self._refuse(key, reason)
            return False
        finally:
            self._under_way.recording = None
        self._graphs[key] = recording
        self._seen.pop(key, None)
        return True

    def repeats(self, call: Callable[[], None]) -> bool:
        """If this thread is recording: have ``call`` made at this place of every replay instead, and say so."""
        recording: Recording | None = getattr(self._under_way, "recording", None)
        if recording is not None:
            recording.repeat(call)
        return recording is not None

    def _refuse(self, key: Hashable, reason: str) -> None:
        """Let ``key`` run eagerly from now on."""
        self._graphs.pop(key, None)
        self._seen[key] = self._seen.get(key) or reason
        _return_memory()


@lru_cache(maxsize=16)
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to record on, whose matrix library has its workspace, lest it take it from the first graph's memory."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        tile = torch.zeros((16, 16), dtype=torch.bfloat16, device=device)
        torch.addmm(tile[0], tile, tile)
    stream.synchronize()
    return stream


def _on_a_free_stream(value: Tensor) -> bool:
    """Whether ``value`` is on a GPU, whose stream is not itself being recorded by the caller."""
    return value.is_cuda and not torch.cuda.is_current_stream_capturing()


def _return_memory() -> None:
    """A dropped graph's memory is PyTorch's to reuse only for graphs; this hands it back to the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
