"""CUDA graphs by shape: recorded at the second use, replayed from then on, the least recently used dropped."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger("paravae")

Function = Callable[[Tensor], Tensor]

_SEEN_LIMIT = 256  # keys remembered without a graph: those met once, and those that would not record


class Recorded(Protocol):
    """A function recorded for one shape."""

    def __call__(self, value: Tensor) -> Tensor: ...


class CudaGraph:
    """``function`` recorded as one CUDA graph, with memory of its own for input, result and all between.

    A replay waits for the one before, on whatever stream that was, and hands out a copy of the result.
    ``working``: the bytes of the largest tensors that the function holds at once. Taken beforehand, they serve
    smaller tensors too; taken as they come, each size would keep memory of its own, twice as much in all.
    """

    def __init__(self, function: Function, value: Tensor, working: Sequence[int]) -> None:
        self._input = value.clone()
        self._graph = torch.cuda.CUDAGraph()
        self._done = torch.cuda.Event()
        stream = _recording_stream(value.device)
        # thread_local: other threads (NCCL's watchdog) may call CUDA meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            taken = [torch.empty(size, dtype=torch.uint8, device=value.device) for size in working]
            del taken  # to the graph's own pool
            self._output = function(self._input)
        self._done.record()

    def __call__(self, value: Tensor) -> Tensor:
        stream = torch.cuda.current_stream(value.device)
        stream.wait_event(self._done)
        self._input.copy_(value)
        self._graph.replay()
        result = self._output.clone()
        self._done.record(stream)
        return result


class GraphCache:
    """At most ``limit`` recorded graphs; 0 records none, and every call runs eagerly."""

    def __init__(
        self,
        limit: int,
        record: Callable[[Function, Tensor, Sequence[int]], Recorded] = CudaGraph,
        can_record: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self._limit, self._record, self._can_record = limit, record, can_record or _on_a_free_stream
        self._graphs: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, str | None] = OrderedDict()  # why it is not recorded, None: not tried yet
        self._lock = threading.Lock()

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
        self, key: Hashable, function: Function, value: Tensor, working: Callable[[], Sequence[int]] = tuple
    ) -> Tensor:
        """``function(value)``; ``key`` names everything but the values in ``value`` that the result depends on.

        ``working``: asked, if a graph is recorded, for the bytes of the largest tensors held at once.
        """
        if self._limit == 0 or not self._can_record(value):
            return function(value)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None and key in self._seen and self._seen[key] is None:
                graph = self._try_to_record(key, function, value, working())
            if graph is not None:
                self._graphs.move_to_end(key)
                return graph(value)
            self._seen.setdefault(key, None)
            if len(self._seen) > _SEEN_LIMIT:
                self._seen.popitem(last=False)
        return function(value)

    def _try_to_record(
        self, key: Hashable, function: Function, value: Tensor, working: Sequence[int]
    ) -> Recorded | None:
        while len(self._graphs) >= self._limit:
            self._graphs.popitem(last=False)
            _return_memory()
        try:
            graph = self._graphs[key] = self._record(function, value, working)
        except RuntimeError as error:  # out of memory among them
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            logger.warning("no CUDA graph for %s, it runs eagerly: %s", list(value.shape), reason)
            self._seen[key] = reason
            _return_memory()
            return None
        del self._seen[key]
        return graph


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
