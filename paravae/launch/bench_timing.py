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
PEAKS = ("peak_gib", "first_peak_gib")
_RATE_REPEATS = 10
_FEWEST = 5  # timed calls of one that takes long: enough for a median and its spread


def call_ms(call: Callable[[], object], device: torch.device, group: RankGroup | None = None) -> float:
    """Milliseconds of one call, the device idle before it: by CUDA events on a GPU, by the clock on a CPU.

    The ranks of ``group`` start together.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if group is not None:
        group.minimum("ready for a call", 0)
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def interleaved_ms(
    calls: Mapping[str, Callable[[], object]], repeats: Mapping[str, int], device: torch.device, group: RankGroup
) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` calls of each, in rounds of one call each: a drift of the clocks hits all alike.

    On several ranks all start a call together, and the slowest rank's time counts.
    """
    own: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(max(repeats.values())):
        for name, call in calls.items():
            if index < repeats[name]:
                own[name].append(call_ms(call, device, group))
    return {name: [largest(f"time of {name}", ms, group) for ms in times] for name, times in own.items()}


def turns_ms(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    group: RankGroup,
    *,
    seconds: float | None,
    together: bool,
) -> dict[str, list[float]]:
    """``interleaved_ms`` after a round that does not count.

    ``seconds``: of one that takes long, only as many calls as fit, but five. ``together``: in rounds of all; else one
    after another, the last one's cached memory given back, where the device has not room for the leftovers of all.
    """
    found: dict[str, list[float]] = {}
    for turn in [calls] if together else [{name: call} for name, call in calls.items()]:
        if not together and device.type == "cuda":
            torch.cuda.empty_cache()
        first = interleaved_ms(turn, dict.fromkeys(turn, 1), device, group)
        counts = {name: _affordable(repeats, ms / 1e3, seconds) for name, (ms,) in first.items()}
        found |= interleaved_ms(turn, counts, device, group)
    return found


def _affordable(repeats: int, call_s: float, seconds: float | None) -> int:
    if seconds is None:
        return repeats
    return min(repeats, max(_FEWEST, int(seconds / max(call_s, 1e-6))))


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
        return first_calls(), no_peaks(device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)

    def peak_of(run: Callable[[], Any]) -> tuple[Any, float]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        # Reserved: a graph's pool counts. Allocated: so does what found room among the blocks held before.
        more = torch.cuda.max_memory_reserved(device) - reserved, torch.cuda.max_memory_allocated(device) - allocated
        return result, max(more) / GIB

    result, first = peak_of(first_calls)
    held = result.nelement() * result.element_size() / GIB if isinstance(result, torch.Tensor) else 0.0
    _, later = peak_of(call)
    return result, dict(zip(PEAKS, (round(later - held, 3), round(first, 3)), strict=True))


def no_peaks(device: torch.device) -> dict[str, float | None]:
    """The peaks of a rank that has nothing to do; None where they are not known of any."""
    return dict.fromkeys(PEAKS, 0.0 if device.type == "cuda" else None)


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
