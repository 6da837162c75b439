"""A stand-in for TensorRT's runtime, whose calls need a GPU: engines are ONNX files, run by ONNX Runtime on the CPU.

It has the calls that paravae makes, with TensorRT's names, order and ways to fail, and refuses what TensorRT would:
an input shape outside the profile, an address that was not set, too little memory to work in. What it is told to fail
at, it fails at, as TensorRT does: None or False, and a message to the logger.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from paravae.vae.engines.trt.shapes import Profile

WORKING_BYTES = 4096
NUMPY = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(uint8)": "UINT8"}
DTYPE_OF = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8}


def engine_bytes(onnx: Path, profiles: Sequence[Profile]) -> bytes:
    """What the stand-in takes for a serialized engine."""
    header = json.dumps([[profile.min, profile.opt, profile.max] for profile in profiles]).encode()
    return len(header).to_bytes(8, "little") + header + onnx.read_bytes()


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


@dataclass
class Log:
    """Takes messages as TensorRT's logger does, and gives them back as paravae's library does."""

    messages: list[str] = field(default_factory=list)

    def complaints(self) -> str:
        said, self.messages = "; ".join(self.messages), []
        return said


@dataclass
class FakeTensorRT:
    """Both the ``tensorrt`` module and the library around it. ``fails``: names of calls that fail."""

    fails: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    logger: Log = field(default_factory=Log)
    TensorIOMode: Any = TensorIOMode
    ExecutionContextAllocationStrategy: Any = ExecutionContextAllocationStrategy

    @property
    def module(self) -> FakeTensorRT:
        return self

    def complaints(self) -> str:
        return self.logger.complaints()

    def Runtime(self, logger: Log) -> _Runtime:  # noqa: N802 - TensorRT's name
        return _Runtime(self)

    def failing(self, call: str) -> bool:
        self.calls.append(call)
        if call in self.fails:
            self.logger.messages.append(f"{call} was told to fail")
        return call in self.fails


@dataclass
class _Runtime:
    library: FakeTensorRT

    def deserialize_cuda_engine(self, blob: bytes) -> _Engine | None:
        if self.library.failing("deserialize_cuda_engine"):
            return None
        try:
            size = int.from_bytes(blob[:8], "little")
            profiles = [Profile(*map(tuple, entry)) for entry in json.loads(blob[8 : 8 + size])]
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(blob[8 + size :], options, providers=["CPUExecutionProvider"])
        except Exception as error:
            self.library.logger.messages.append(f"not an engine: {type(error).__name__}")
            return None
        return _Engine(self.library, session, profiles)


@dataclass
class _Engine:
    library: FakeTensorRT
    session: Any
    profiles: list[Profile]

    def __post_init__(self) -> None:
        self.tensors = {port.name: port for port in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.names = list(self.tensors)
        self.input = self.session.get_inputs()[0].name

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == self.input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return Enum("DataType", list(DTYPE_OF))[NUMPY[self.tensors[name].type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        batch, channels, *_ = self.get_tensor_shape(name)
        profile = self.profiles[index]
        return [(batch, channels, *size) for size in (profile.min, profile.opt, profile.max)]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> _Context | None:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if self.library.failing("memory"):
            raise torch.OutOfMemoryError("CUDA out of memory: there is none left")
        return None if self.library.failing("create_execution_context") else _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.profile, self.memory = engine, 0, 0
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] | None = None
        self.output: np.ndarray | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return not self.engine.library.failing("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        fits = all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
        self.shape = shape if fits else None
        return fits and not self.engine.library.failing("set_input_shape")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of the output: what a run on zeros gives, there being no shape inference to ask."""
        assert self.shape is not None
        kind = NUMPY[self.engine.tensors[self.engine.input].type]
        zeros = np.zeros(self.shape, DTYPE_OF[kind])
        return tuple(self.engine.session.run([name], {self.engine.input: zeros})[0].shape)

    def update_device_memory_size_for_shapes(self) -> int:
        return WORKING_BYTES

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = size if address else 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return not self.engine.library.failing("set_tensor_address")

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.library.failing("execute_async_v3") or self.memory < WORKING_BYTES:
            return False
        assert self.shape is not None
        (output_name,) = (name for name in self.engine.names if name != self.engine.input)
        kind = NUMPY[self.engine.tensors[self.engine.input].type]
        given = _memory(self.addresses[self.engine.input], self.shape, DTYPE_OF[kind])
        (result,) = self.engine.session.run([output_name], {self.engine.input: given})
        if "nan" in self.engine.library.fails and result.dtype.kind == "f":
            result = np.full_like(result, np.nan)
        _memory(self.addresses[output_name], result.shape, result.dtype)[...] = result
        return True


def _memory(address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """A view of memory that somebody else keeps."""
    values = np.dtype(dtype).itemsize * int(np.prod(shape))
    return np.frombuffer((ctypes.c_char * values).from_address(address), dtype=dtype).reshape(shape)
