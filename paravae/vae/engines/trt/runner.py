"""One loaded TensorRT engine: a tensor in, a tensor out, on the caller's stream.

The input is read and the output written by work that is queued on PyTorch's current stream, after what made the input
and before what will read the output; the host waits for nothing. An engine does one thing at a time: a call on another
stream than the last one's starts, on the GPU, when that is through. Memory to work in is PyTorch's, so the allocator
knows of it and gives it to others between calls on that stream.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from paravae.vae.engines.graphs import GraphCache
from paravae.vae.engines.trt.shapes import Profile, choose_profile

DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "UINT8": torch.uint8}
"""By the name that TensorRT gives a data type."""


class EngineError(RuntimeError):
    """An engine cannot be loaded or run: the caller falls back, or says so."""


class Library(Protocol):
    """What is used of the ``tensorrt`` or ``tensorrt_rtx`` module, and where its messages go."""

    @property
    def module(self) -> Any: ...

    @property
    def logger(self) -> Any: ...

    def complaints(self) -> str:
        """What TensorRT has logged as errors since this was last asked, in one line."""
        ...


@dataclass(frozen=True)
class Port:
    """An input or output of an engine; ``shape``: -1 where it is the caller's choice."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Runner:
    """See the head of this file.

    Args:
        library: the module whose engine it is.
        blob: the serialized engine.
        device: where it is to run.
        graphs: CUDA graphs to keep, one for each shape; 0: none.

    Raises:
        EngineError: this GPU, driver or version of TensorRT refuses the engine, or it is not what paravae runs.
    """

    def __init__(self, library: Library, blob: bytes, device: torch.device, graphs: int = 0) -> None:
        self._library, self.device, self._graphs = library, device, GraphCache(graphs)
        try:
            self._runtime = library.module.Runtime(library.logger)
        except TypeError as error:  # the bindings' word for a constructor that gave nothing
            raise EngineError(f"TensorRT could not start: {library.complaints() or error}") from error
        self._engine = self._must("deserialize the engine", self._runtime.deserialize_cuda_engine(blob))
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = library.module.TensorIOMode.INPUT
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == is_input]
        if len(names) != 2 or len(inputs) != 1:
            raise EngineError(f"the engine has the tensors {', '.join(names)}, not one input and one output")
        self.input = self._port(inputs[0])
        self.output = self._port(next(name for name in names if name != inputs[0]))
        self.profiles = tuple(self._profile(index) for index in range(self._engine.num_optimization_profiles))
        self._contexts: dict[int, Any] = {}
        self.resident_bytes = len(blob)
        self._done: torch.cuda.Event | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The engine's output for ``x``, which is converted to the engine's dtype; new memory, the caller's.

        Raises:
            EngineError: no profile takes the shape, or TensorRT fails.
            torch.OutOfMemoryError: there is no room for the output or to work in.
        """
        if choose_profile(self.profiles, (x.shape[-2], x.shape[-1])) is None:
            raise EngineError(f"none of the engine's {len(self.profiles)} profiles takes {list(x.shape)}")
        x = x.to(self.input.dtype).contiguous()
        if len(self.input.shape) == x.dim() + 1:  # others' engines keep an axis for the lone frame
            x = x.unsqueeze(2)
        with torch.cuda.device(self.device) if x.is_cuda else nullcontext():
            if self._done is not None:
                torch.cuda.current_stream(self.device).wait_event(self._done)
            y = self._graphs.run(x.shape, self._queue, x)
            if x.is_cuda:
                self._done = torch.cuda.Event()
                self._done.record()
        return y.squeeze(2) if y.dim() == 5 else y

    def release(self) -> None:
        """Wait until nothing that was queued needs the engine any more: then it may go."""
        if self._done is not None:
            self._done.synchronize()
        self._graphs.clear()
        self._contexts.clear()

    def _queue(self, x: Tensor) -> Tensor:
        """Queue the engine's work on the current stream."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if x.is_cuda else 0
        context = self._context((x.shape[-2], x.shape[-1]), stream)
        self._must(f"take an input of {list(x.shape)}", context.set_input_shape(self.input.name, tuple(x.shape)))
        shape = tuple(context.get_tensor_shape(self.output.name))
        if any(size < 0 for size in shape):
            raise EngineError(f"the engine does not know the size of its output for {list(x.shape)}: {shape}")
        output = torch.empty(shape, dtype=self.output.dtype, device=self.device)
        needed = context.update_device_memory_size_for_shapes()
        working = torch.empty(needed, dtype=torch.uint8, device=self.device)
        context.set_device_memory(working.data_ptr(), needed)
        for port, tensor in ((self.input, x), (self.output, output)):
            self._must(f"bind {port.name}", context.set_tensor_address(port.name, tensor.data_ptr()))
        self._must("run", context.execute_async_v3(stream))
        return output

    def _context(self, size: tuple[int, int], stream: int) -> Any:
        """The context of the profile for a size, made when it is first needed."""
        index = choose_profile(self.profiles, size)
        assert index is not None
        if index not in self._contexts:
            strategy = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._must("make a context", self._engine.create_execution_context(strategy))
            self._must(f"take profile {index}", context.set_optimization_profile_async(index, stream))
            self._contexts[index] = context
        return self._contexts[index]

    def _port(self, name: str) -> Port:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise EngineError(f"{name} is {kind}, not one of {', '.join(DTYPES)}")
        return Port(name, tuple(self._engine.get_tensor_shape(name)), DTYPES[kind])

    def _profile(self, index: int) -> Profile:
        if -1 not in self.input.shape:
            return Profile.static((self.input.shape[-2], self.input.shape[-1]))
        low, best, high = (tuple(shape)[-2:] for shape in self._engine.get_tensor_profile_shape(self.input.name, index))
        return Profile(low, best, high)

    def _must(self, what: str, done: Any) -> Any:
        """``done``, unless TensorRT says by it that it could not."""
        if done is None or done is False:
            raise EngineError(f"TensorRT could not {what}: {self._library.complaints() or 'it gave no reason'}")
        return done
