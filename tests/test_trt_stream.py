"""What a loaded engine does on a GPU's streams, with a stand-in for TensorRT that queues PyTorch's kernels there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor

from paravae.vae.engines.trt.runner import Runner
from tests.trt_fake import ExecutionContextAllocationStrategy, FakeTensorRT, TensorIOMode

pytestmark = pytest.mark.cuda

SHAPE = (1, 4, 8, 8)
WORKING_BYTES = 1 << 20
SLOW = 200_000_000  # cycles: a tenth of a second
DataType = Enum("DataType", ["FLOAT"])


@dataclass
class Doubling(FakeTensorRT):
    """TensorRT with one engine, which gives twice its input, slowly if told so."""

    cycles: int = 0
    streams: list[int] = field(default_factory=list)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        return self

    def deserialize_cuda_engine(self, blob: bytes) -> Any:
        return _Engine(self)


@dataclass
class _Engine:
    library: Doubling
    num_io_tensors: int = 2
    num_optimization_profiles: int = 1

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1, 4, -1, -1)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(1, 4, 1, 1), SHAPE, (1, 4, 64, 64)]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Any:
        return _Context(self.library)


@dataclass
class _Context:
    """Works in the memory that it is given: what another run leaves there meanwhile would show in the result."""

    library: Doubling
    shape: tuple[int, ...] = ()
    addresses: dict[str, int] = field(default_factory=dict)
    working: int = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def update_device_memory_size_for_shapes(self) -> int:
        return WORKING_BYTES

    def set_device_memory(self, address: int, size: int) -> None:
        assert size == WORKING_BYTES
        self.working = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        x, y, working = (_at(address, self.shape) for address in (*self.addresses.values(), self.working))
        self.library.streams.append(stream)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.add(x, x, out=working)
            if self.library.cycles:
                torch.cuda._sleep(self.library.cycles)
            y.copy_(working)
        return True


@dataclass(frozen=True)
class _Memory:
    __cuda_array_interface__: dict[str, Any]


def _at(address: int, shape: tuple[int, ...]) -> Tensor:
    """The fp32 tensor that lies there."""
    return torch.as_tensor(
        _Memory({"shape": shape, "typestr": "<f4", "data": (address, False), "version": 3}), device="cuda"
    )


def runner(library: Doubling, graphs: int = 0) -> Runner:
    return Runner(library, b"", torch.device("cuda", 0), graphs)


def filled(value: float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.full(shape, value, device="cuda")


def assert_all(tensor: Tensor, value: float) -> None:
    assert torch.equal(tensor, torch.full_like(tensor, value))


def on(stream: torch.cuda.Stream, work: Callable[[], Tensor]) -> Tensor:
    with torch.cuda.stream(stream):
        return work()


@pytest.mark.parametrize("graphs", [0, 2])
def test_it_runs_between_what_makes_its_input_and_what_reads_its_output(graphs: int) -> None:
    run, stream, x = runner(Doubling(cycles=SLOW // 10), graphs), torch.cuda.Stream(), filled(0)
    for _ in range(2):  # from the second call on it is a graph; and kernels are loaded, for which the host may wait
        on(stream, lambda: run(x) + 1)
    torch.cuda.synchronize()

    def work() -> Tensor:
        torch.cuda._sleep(SLOW)
        x.fill_(3)
        y = run(x) + 1
        x.fill_(100)
        return y

    y = on(stream, work)
    assert not stream.query()  # the host has waited for nothing
    stream.synchronize()
    assert_all(y, 7)


@pytest.mark.parametrize("graphs", [0, 2])
def test_it_queues_on_the_current_stream_only(graphs: int) -> None:
    library = Doubling()
    run, stream = runner(library, graphs), torch.cuda.Stream()
    for _ in range(2):  # as above; and the host does wait when a graph is recorded
        run(filled(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLOW)  # on the default stream, which nobody waits for
    y = on(stream, lambda: run(filled(2)))
    stream.synchronize()
    assert not torch.cuda.default_stream().query()
    assert_all(y, 4)
    if not graphs:
        assert library.streams[-1] == stream.cuda_stream


def test_a_call_on_another_stream_waits_for_the_last_one() -> None:
    library = Doubling(cycles=SLOW)
    run, first, second = runner(library), torch.cuda.Stream(), torch.cuda.Stream()
    inputs = filled(1), filled(5)
    torch.cuda.synchronize()
    slow = on(first, lambda: run(inputs[0]))
    library.cycles = 0
    quick = on(second, lambda: run(inputs[1]))
    second.synchronize()
    assert first.query()
    assert_all(slow, 2)
    assert_all(quick, 10)


def test_graphs_by_shape_hand_out_results_of_their_own() -> None:
    library = Doubling()
    run, shapes = runner(library, graphs=2), [SHAPE, (1, 4, 16, 8)]
    kept = [(run(filled(value, shape)), 2 * value) for value in range(5) for shape in shapes]
    for y, value in kept:
        assert_all(y, value)
    assert len(library.streams) == 2 * len(shapes)  # once at once, once for the graph; a replay asks TensorRT nothing
    assert_all(run(filled(9, (1, 4, 3, 5))), 18)


def test_memory_to_work_in_is_given_back() -> None:
    run, x = runner(Doubling()), filled(1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = run(x)
    assert torch.cuda.max_memory_allocated() - before >= WORKING_BYTES
    assert torch.cuda.memory_allocated() - before < WORKING_BYTES
    assert_all(y, 2)


@pytest.mark.parametrize("graphs", [0, 2])
def test_release_waits_until_the_engine_is_through(graphs: int) -> None:
    library = Doubling(cycles=SLOW)
    run, stream = runner(library, graphs), torch.cuda.Stream()
    for _ in range(3):
        y = on(stream, lambda: run(filled(1)))
    run.release()
    assert stream.query()
    assert_all(y, 2)
