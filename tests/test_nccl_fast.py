"""The fast engine on several GPUs: every plan of a decode, against one GPU; graphs around the collectives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
from paravae.launch.bench_model import Model, random_model
from paravae.vae.choice import DecodePlan, DecodePlanner
from paravae.vae.engines import fast_engine
from paravae.vae.engines.fast_engine import FastEngine
from paravae.vae.pixels import to_uint8
from tests.builders import max_error, noise, pictures, rms_error
from tests.ranks import Rank, check, run_ranks

pytestmark = pytest.mark.nccl

GPUS = min(4, torch.cuda.device_count()) if torch.cuda.is_available() else 0


@cache
def model() -> Model:
    fast_engine._tuned_convolutions = nullcontext  # trying algorithms takes seconds for each plan
    return random_model()


def full_size(here: Rank) -> AutoencoderKLQwenImage:
    return model().build(QwenImageVAEConfig(use_parallel_decode=True), torch.bfloat16, here.device)


def alone(
    here: Rank,
    value: Tensor,
    result: Callable[[AutoencoderKLQwenImage, Tensor], Tensor] = AutoencoderKLQwenImage.decode,
) -> tuple[Tensor, float]:
    """One GPU's own result, and how far another rounding of it may be: root two times its RMS error against fp32, as
    for two that round independently (cuDNN's algorithms, and so their roundings, depend on a window's shape)."""
    single = full_size(here)
    single.config = replace(single.config, use_parallel_decode=False)
    own = result(single, value)
    return own, 2**0.5 * rms_error(own, result(single.float(), value.float()))


def plans_of(vae: AutoencoderKLQwenImage, latents: Tensor) -> list[DecodePlan]:
    planner = DecodePlanner(
        config=vae.config,
        engine=vae.engine,
        machine=vae._machine(vae.parallel_group),
        shape=tuple(latents.shape),
        dtype=latents.dtype,
        device=latents.device,
        ranks=vae.parallel_group.size,
        pixel_bytes=2,
    )
    return list(planner.patches())


def every_plan(here: Rank, batch: int) -> str:
    """Every grid, head shared or not, images dealt or not: one GPU's pixels but for rounding; the eager call, the one
    that records and the replays all alike."""
    vae = full_size(here)
    latents = noise(batch, 16, 1, 40, 56, dtype=torch.bfloat16, device=here.device)
    truth, bound = alone(here, latents)
    plans = plans_of(vae, latents)
    assert {plan.choice.head for plan in plans} == {"own", "shared"}
    assert {plan.choice.groups for plan in plans} >= ({1, 2} if batch > 1 else {1})
    chosen = DecodePlanner.plan
    for plan in plans:
        DecodePlanner.plan = lambda self, mode, budget, plan=plan: plan  # type: ignore[method-assign,misc]
        try:
            vae.config = replace(vae.config)  # another object, so that it is planned anew
            results = [vae.decode(latents) for _ in range(4)]
        finally:
            DecodePlanner.plan = chosen  # type: ignore[method-assign]
        assert vae.last_choice == plan.choice
        assert isinstance(vae.engine, FastEngine)
        assert not vae.engine.graphs.refused
        assert all(torch.equal(result, results[0]) for result in results), plan.choice.how
        error = rms_error(results[0], truth)
        assert error <= bound, f"{plan.choice.how}: {error} from one GPU, {bound} is allowed"
    return "fine"


def tiles_and_uint8(here: Rank) -> str:
    """Tiles dealt to ranks are those of one rank to rounding; levels are those of the float pixels."""
    vae = full_size(here)
    latents = noise(1, 16, 1, 64, 72, dtype=torch.bfloat16, device=here.device)
    serial, bound = alone(here, latents, AutoencoderKLQwenImage.tiled_decode)
    for _ in range(3):
        error = rms_error(vae.parallel_tiled_decode(latents), serial)
        assert error <= bound, f"{error} from one GPU, {bound} is allowed"
    pixels = vae.parallel_patch_decode(latents)
    for _ in range(3):
        assert max_error(vae.parallel_patch_decode(latents, output_type="uint8"), to_uint8(pixels)) <= 1
    received = [vae.parallel_patch_decode(latents, gather_to=0) for _ in range(3)]
    if here.rank == 0:
        assert all(torch.equal(some, pixels) for some in received if some is not None)
        assert None not in received
    else:
        assert received == [None] * 3
    return "fine"


def encode_and_video(here: Rank) -> str:
    vae = full_size(here)
    picture = pictures(1, 3, 1, 512, 640, dtype=torch.bfloat16, device=here.device)
    truth, bound = alone(here, picture, lambda vae, pixels: vae.encode(pixels).mean)
    for _ in range(4):
        error = rms_error(vae.encode(picture).mean, truth)
        assert error <= bound, f"{error} from one GPU, {bound} is allowed"
    film = noise(1, 16, 3, 24, 40, dtype=torch.bfloat16, device=here.device)
    truth, bound = alone(here, film)
    error = rms_error(vae.parallel_patch_decode(film), truth)
    assert error <= bound, f"{error} from one GPU, {bound} is allowed"
    return "fine"


CASES: dict[str, Callable[[Rank], object]] = {
    "every-plan": partial(every_plan, batch=1),
    "every-plan-of-a-batch": partial(every_plan, batch=2),
    "tiles-and-uint8": tiles_and_uint8,
    "encode-and-video": encode_and_video,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(CASES, GPUS, tmp_path_factory.mktemp("fast") / "rendezvous", backend="cpu:gloo,cuda:nccl")


@pytest.mark.parametrize("name", list(CASES))
def test_on_gpus(name: str, results: dict[str, Any]) -> None:
    check(results, name)
