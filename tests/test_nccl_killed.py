"""What a rank that is killed, or out of memory, leaves the others with on GPUs; and how a world comes to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paravae import RankError
from paravae.vae.engines.fast_engine import FastEngine
from tests.builders import max_error, noise, small_vae
from tests.fault_cases import error_of, expect
from tests.killed_cases import Death, check_told
from tests.ranks import Rank, check, run_ranks

pytestmark = pytest.mark.nccl

BACKEND = "cpu:gloo,cuda:nccl"
PROMPT_S = 10.0


@pytest.mark.parametrize(
    ("moment", "victim", "graphs"),
    [
        ("between decodes", 0, 8),
        ("before a replay", 0, 8),
        ("before a replay", 1, 8),
        ("in the gather", 0, 8),
        ("in the gather", 1, 0),
        ("in the group's first gather", 0, 0),
        ("in the group's first gather", 1, 0),
        ("in the gather to one", 0, 0),
        ("in the gather to one", 1, 0),
        ("with the attention", 1, 0),
        ("in its share of a video", 0, 0),
        ("in a stream", 1, 0),
    ],
)
def test_the_others_hear_which_was_killed(moment: str, victim: int, graphs: int, tmp_path: Path) -> None:
    """They do, no kernel of NCCL's waits on, and each GPU still works."""
    death, rendezvous = Death(tmp_path / "note"), tmp_path / "rendezvous"
    options = {"backend": BACKEND, "dtype": torch.bfloat16, "graphs": graphs}
    check_told(moment, 2, victim, death, rendezvous, most_s=PROMPT_S, **options)


def world_ends_with_graphs_alive(here: Rank) -> str:
    vae = small_vae(torch.bfloat16, here.device, use_parallel_decode=True, parallel_decode_mode="patch")
    latents = noise(1, 16, 1, 16, 16, dtype=torch.bfloat16, device=here.device)
    for _ in range(3):
        pixels = vae.decode(latents)
    assert isinstance(vae.engine, FastEngine)
    assert vae.engine.graphs.recorded
    started = time.monotonic()
    dist.destroy_process_group()
    assert time.monotonic() - started < PROMPT_S
    assert pixels.isfinite().all()
    return "fine"


def out_of_gpu_memory(here: Rank) -> str:
    """The last rank's GPU is full, but nobody knew: it raises PyTorch's own error, the others say so, twice (at a
    shape's second use they would record a graph); with the memory back, all decode."""
    victim = here.size - 1
    options = {"use_parallel_decode": True, "parallel_decode_mode": "patch", "memory_limit_gib": 64.0}
    vae = small_vae(torch.bfloat16, here.device, **options)
    small, large = (noise(1, 16, 1, side, side, dtype=torch.bfloat16, device=here.device) for side in (16, 256))
    vae.decode(small)  # NCCL has what it needs
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    hog = None
    if here.rank == victim:
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(free - (48 << 20), dtype=torch.uint8, device=here.device)
    for _ in range(2):
        error = error_of(lambda: vae.decode(large))
        if here.rank == victim:
            expect(error, torch.OutOfMemoryError)
        else:
            expect(error, RankError, f"rank {victim} of {here.size} failed: OutOfMemoryError")
    del hog
    torch.cuda.empty_cache()
    for latents in (large, small):
        truth = small_vae(torch.bfloat16, here.device).decode(latents)
        assert max_error(vae.decode(latents), truth) <= 0.1
    return "fine"


@pytest.mark.parametrize("case", [world_ends_with_graphs_alive, out_of_gpu_memory])
def test_a_world_of_two(case: Callable[[Rank], object], tmp_path: Path) -> None:
    name = case.__name__
    check(run_ranks({name: case}, 2, tmp_path / "rendezvous", backend=BACKEND, timeout_s=120, tidy=False), name)
