"""Clocks and gauges: the time of a call, the memory it takes, and the rates that this machine can reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from paravae.vae.comm import RankGroup
from paravae.vae.memory import GIB

Result = TypeVar("Result")

MEMORY_WORDS = (
    "peak_gib: the most that PyTorch's allocator held in a call of a shape that was called before, cached leftovers "
    "given back; first_peak_gib: the most in the first calls of a shape, in which cuDNN tries its algorithms, kernels "
    "compile and graphs are recorded. Both less what it held before the shape's first call: over the weights as "
    "loaded, so anything packed from them and CUDA graphs count. Other contestants' weights are in both terms."
)
_RATE_REPEATS = 10


def call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, the device idle before it: by CUDA events on a GPU, by the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def interleaved_ms(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` calls of each, in rounds of one call each: a drift of the clocks hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(call_ms(call, device))
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of milliseconds, to the microsecond."""
    ordered = sorted(times)
    fifth = len(ordered) // 5
    found = {"ms": statistics.median(ordered), "p20_ms": ordered[fifth], "p80_ms": ordered[-1 - fifth]}
    return {name: round(value, 3) for name, value in found.items()}


def with_peaks(
    first_calls: Callable[[], Result], call: Callable[[], object], device: torch.device
) -> tuple[Result, dict[str, float | None]]:
    """What ``first_calls`` gives, and the GiB that these and a later ``call`` took (see ``MEMORY_WORDS``)."""
    if device.type != "cuda":
        return first_calls(), {"peak_gib": None, "first_peak_gib": None}
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)

    def peak_of(run: Callable[[], Any]) -> tuple[Any, float]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, round((torch.cuda.max_memory_reserved(device) - before) / GIB, 3)

    result, first = peak_of(first_calls)
    held = result.nelement() * result.element_size() / GIB if isinstance(result, torch.Tensor) else 0.0
    _, later = peak_of(call)
    return result, {"peak_gib": round(later - held, 3), "first_peak_gib": first}


def largest(name: str, value: float, group: RankGroup) -> float:
    """The largest of the ranks' values, to a billionth."""
    return -group.minimum(f"minus {name}", -round(1e9 * value)) / 1e9


def machine_rates(device: torch.device) -> dict[str, float]:
    """What this device reaches on the simplest work: a large bf16 matrix product, and a copy in its memory."""
    cuda = device.type == "cuda"
    side, copied = (8192, 2**30) if cuda else (512, 2**26)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matmul_s = _median_s(lambda: torch.matmul(a, b, out=product), device)
    copy_s = _median_s(lambda: target.copy_(source), device)
    return {
        "bf16_matmul_side": side,
        "bf16_matmul_tflops": round(2 * side**3 / matmul_s / 1e12, 3),
        "copy_bytes": 2 * copied,  # read and written
        "copy_gb_per_s": round(2 * copied / copy_s / 1e9, 1),
    }


def _median_s(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        call()
    return statistics.median(call_ms(call, device) for _ in range(_RATE_REPEATS)) / 1e3
