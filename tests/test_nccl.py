"""The cases that gloo ranks run, on GPUs: tensors travel by NCCL, agreements by gloo. One world, up to four GPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.builders import max_error, noise, small_vae
from tests.parallel_cases import cases_for
from tests.ranks import Outcome, Rank, check, run_ranks

pytestmark = pytest.mark.nccl

Results = dict[str, list[Outcome]]
GPUS = min(4, torch.cuda.device_count()) if torch.cuda.is_available() else 0


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    rendezvous = tmp_path_factory.mktemp("nccl") / "rendezvous"
    return run_ranks(cases_for(GPUS), GPUS, rendezvous, backend="cpu:gloo,cuda:nccl", timeout_s=280)


@pytest.mark.parametrize("name", list(cases_for(max(GPUS, 2))))
def test_on_nccl_ranks(name: str, results: Results) -> None:
    check(results, name)


def nccl_alone(here: Rank) -> str:
    """A world whose only backend is NCCL: a gloo group for agreements is made beside it, in subgroups too."""
    assert "cpu:" not in dist.get_backend_config(dist.group.WORLD)
    vae = small_vae(device=here.device, use_parallel_decode=True, parallel_decode_mode="patch")
    single = small_vae(device=here.device)
    latents = noise(1, 16, 1, 9, 6, device=here.device)
    assert max_error(vae.decode(latents), single.decode(latents)) <= 2e-5
    assert vae.parallel_group.size == here.size
    first = dist.new_group([0, 1])
    if here.rank < 2:
        vae.set_parallel_group(first)
        assert max_error(vae.decode(latents), single.decode(latents)) <= 2e-5
        assert vae.last_choice is not None
        assert vae.last_choice.ranks == 2
    return "fine"


def decode_queues_without_waiting(here: Rank) -> str:
    """The GPU result needs no more host waits than the agreement: what is returned is still being computed."""
    vae = small_vae(torch.bfloat16, here.device, use_parallel_decode=True)
    latents = noise(1, 16, 1, 32, 32, dtype=torch.bfloat16, device=here.device)
    expected = vae.parallel_patch_decode(latents)
    stream = torch.cuda.Stream(here.device)
    stream.wait_stream(torch.cuda.current_stream(here.device))
    with torch.cuda.stream(stream):  # another stream than the default: all must be ordered on it
        for _ in range(5):
            pixels = vae.parallel_patch_decode(latents)
    torch.cuda.current_stream(here.device).wait_stream(stream)
    assert torch.equal(pixels, expected)
    return "fine"


CASES: dict[str, Callable[[Rank], object]] = {"nccl-alone": nccl_alone, "another-stream": decode_queues_without_waiting}


@pytest.mark.parametrize("name", list(CASES))
def test_world_of_nccl_alone(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    rendezvous = tmp_path_factory.mktemp("nccl-alone") / "rendezvous"
    check(run_ranks({name: CASES[name]}, GPUS, rendezvous, backend="nccl"), name)
