"""One GPU: equal to diffusers there, as good in bf16, refusing NaN, and within the memory that is estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from paravae import AutoencoderKLQwenImage, QwenImageVAEArchConfig, QwenImageVAEConfig
from paravae.layers import fallbacks
from paravae.vae import plan
from paravae.vae.checks import FiniteCheck
from paravae.vae.engines.base import Load
from paravae.vae.engines.fast_engine import FastEngine
from paravae.vae.engines.graphs import GraphCache
from paravae.vae.memory import device_bytes
from paravae.vae.pixels import to_uint8
from tests.builders import max_error, noise, perturb, pictures, rms_error, small_vae
from tests.case_tools import TILES

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def full_fp32() -> Iterator[None]:
    """fp32 means fp32: no TF32 in convolutions and matrix products."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@lru_cache(maxsize=2)
def pair(base_dim: int) -> tuple[AutoencoderKLQwenImage, nn.Module]:
    """Our model and diffusers' on the GPU in fp32, weights shared. Copy before changing the dtype."""
    from diffusers import AutoencoderKLQwenImage as Qwen

    torch.manual_seed(0)
    reference = Qwen(base_dim=base_dim)
    perturb(reference)
    vae = AutoencoderKLQwenImage(QwenImageVAEConfig(arch_config=QwenImageVAEArchConfig(base_dim=base_dim)))
    vae.load_state_dict(reference.state_dict())
    return vae.cuda(), reference.cuda().eval().requires_grad_(False)


@pytest.mark.parametrize(("base_dim", "size"), [(8, (5, 7)), (8, (33, 20)), (96, (16, 12))])
@pytest.mark.parametrize("frames", [1, 3])
def test_decode_is_diffusers(base_dim: int, size: tuple[int, int], frames: int) -> None:
    vae, reference = pair(base_dim)
    latents = noise(1, 16, frames, *size, device="cuda")
    truth = reference.decode(latents).sample
    assert truth.std() > 0.05
    assert max_error(vae.decode(latents), truth) <= 2e-5


@pytest.mark.parametrize("frames", [1, 5])
def test_encode_is_diffusers(frames: int) -> None:
    vae, reference = pair(8)
    pixels = pictures(2, 3, frames, 72, 40, device="cuda")
    truth = reference.encode(pixels).latent_dist
    posterior = vae.encode(pixels)
    assert posterior.mean.is_cuda
    assert max_error(posterior.mean, truth.mean) <= 2e-5
    assert max_error(posterior.logvar, truth.logvar) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("base_dim", [8, 96])
@pytest.mark.parametrize(("frames", "size"), [(1, (32, 24)), (1, (13, 21)), (3, (16, 12))])
def test_narrow_dtypes_are_as_good_as_diffusers(
    base_dim: int, frames: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """The fast engine's error against the fp32 result: no larger than 1.05 times diffusers' own in the same dtype."""
    vae, reference = pair(base_dim)
    said = fallbacks()
    latents = noise(1, 16, frames, *size, device="cuda").to(dtype)
    pixels = pictures(1, 3, 4 * frames - 3, 8 * size[0], 8 * size[1], device="cuda").to(dtype)
    truth, moments = vae.decode(latents.float()), vae.encode(pixels.float()).mean
    try:
        vae.to(dtype)
        reference.to(dtype)
        eager, recorded = vae.decode(latents), vae.decode(latents)
        theirs = reference.decode(latents).sample
        own_moments, their_moments = vae.encode(pixels).mean, reference.encode(pixels).latent_dist.mean
    finally:
        pair.cache_clear()  # the weights have been rounded
    assert eager.dtype == dtype
    assert torch.equal(eager, recorded), "a graph computes what was recorded"
    assert rms_error(theirs, truth) > 1e-5
    assert rms_error(eager, truth) <= 1.05 * rms_error(theirs, truth)
    assert rms_error(own_moments, moments) <= 1.05 * rms_error(their_moments, moments)
    if base_dim == 96:
        assert fallbacks() == said, "every kernel runs at the published size"


def full_size(dtype: torch.dtype = torch.bfloat16, **options: object) -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    with torch.device("cuda"):
        vae = AutoencoderKLQwenImage(QwenImageVAEConfig(**options))  # type: ignore[arg-type]
    return vae.to(dtype)


def test_graphs_replay_what_they_are_given() -> None:
    """New values at every call, on any stream; results are the caller's own; two shapes do not disturb each other."""
    vae, eager = small_vae(torch.bfloat16, "cuda"), small_vae(torch.bfloat16, "cuda", cuda_graphs=0)
    engine = vae.engine
    assert isinstance(engine, FastEngine)
    shapes = [(1, 16, 1, 9, 20), (2, 16, 1, 5, 7)]
    kept = []
    for step in range(4):
        for shape in shapes:
            latents = noise(*shape, dtype=torch.bfloat16, device="cuda", seed=step)
            stream = torch.cuda.Stream() if step == 3 else torch.cuda.current_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                pixels = vae.decode(latents)
            torch.cuda.current_stream().wait_stream(stream)
            kept.append((pixels, eager.decode(latents)))
    assert len(engine.graphs.recorded) == 2
    assert all(torch.equal(pixels, truth) for pixels, truth in kept)
    first = kept[-1][0].clone()
    kept[-1][0].zero_()
    assert torch.equal(vae.decode(noise(*shapes[1], dtype=torch.bfloat16, device="cuda", seed=3)), first)


def test_encode_and_uint8_are_recorded_too() -> None:
    vae, plain = small_vae(torch.bfloat16, "cuda"), small_vae(torch.bfloat16, "cuda", cuda_graphs=0)
    engine = vae.engine
    assert isinstance(engine, FastEngine)
    for step in range(3):
        pixels = pictures(1, 3, 1, 40, 56, dtype=torch.bfloat16, device="cuda") * (1 - 0.3 * step)
        assert torch.equal(vae.encode(pixels).mean, plain.encode(pixels).mean)
        latents = noise(1, 16, 1, 5, 7, dtype=torch.bfloat16, device="cuda", seed=step)
        assert torch.equal(vae.decode(latents, output_type="uint8"), plain.decode(latents, output_type="uint8"))
    assert len(engine.graphs.recorded) == 2  # the encode in one, the decode in one


def test_a_dropped_graph_gives_its_memory_back() -> None:
    vae = full_size(cuda_graphs=1)
    engine = vae.engine
    assert isinstance(engine, FastEngine)

    def use(side: int) -> int:
        latents = noise(1, 16, 1, side, side, dtype=torch.bfloat16, device="cuda")
        for _ in range(3):
            vae.decode(latents)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    small = use(16)
    large = use(96)
    assert large > small + 2**28
    assert len(engine.graphs.recorded) == 1
    assert use(16) < small + 2**25


def test_no_memory_for_a_graph_means_eager(caplog: pytest.LogCaptureFixture) -> None:
    """A real capture that runs out of memory is given up, and CUDA is sound afterwards."""
    cache = GraphCache(2)
    asked = []

    def double(value: Tensor) -> Tensor:
        asked.append(torch.cuda.is_current_stream_capturing())
        if asked[-1] and value.numel() == 3:
            torch.empty(2**50, dtype=torch.uint8, device=value.device)
        return 2 * value

    for size in (3, 3, 3, 4, 4, 4):
        value = torch.arange(float(size), device="cuda")
        assert torch.equal(cache.run(size, double, value), 2 * value)
    assert asked == [False, True, False, False, False, True]
    assert cache.recorded == (4,)
    assert "out of memory" in cache.refused[3]
    assert "it runs eagerly" in caplog.text


def test_memory_of_a_decode_at_1024() -> None:
    """Once a shape is warm, all that PyTorch holds beside the weights is 0.7 GiB: folded copies, graph, libraries'."""
    vae = full_size()
    latents = noise(1, 16, 1, 128, 128, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        vae.decode(latents)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    vae.decode(latents)
    held = torch.cuda.max_memory_reserved() - before
    print(f"1024 x 1024: {held / 2**30:.3f} GiB over the weights")
    assert held <= 0.7 * 2**30


def test_a_stream_needs_no_more_memory_for_more_frames() -> None:
    vae = full_size()

    def peak(frames: int) -> int:
        latents = noise(1, 16, frames, 24, 32, dtype=torch.bfloat16, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vae.decode(latents, on_frames=lambda pixels: None)
        return torch.cuda.max_memory_allocated() - before

    peak(3)  # convolutions are tried, kernels compiled
    assert peak(9) <= 1.02 * peak(3) + 2**20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["decode", "tiled_decode", "parallel_patch_decode"])
def test_not_finite_is_refused(value: float, method: str) -> None:
    """After the work is queued, yet before anything is returned; and the next decode is right."""
    vae = small_vae(device="cuda", **TILES)
    latents = noise(1, 16, 1, 9, 20, device="cuda")
    spoilt = latents.clone()
    spoilt[0, 5, 0, 8, 19] = value
    with pytest.raises(ValueError, match=r"latents hold . NaN and . Inf among 2880 values"):
        getattr(vae, method)(spoilt)
    assert getattr(vae, method)(latents).isfinite().all()


def test_finite_check_waits_only_when_asked() -> None:
    spoilt = torch.full((4,), torch.nan, device="cuda")
    check = FiniteCheck("latents", spoilt)
    with pytest.raises(ValueError, match="latents hold 4 NaN and 0 Inf among 4 values"):
        check.raise_if_not()
    FiniteCheck("latents", torch.zeros(4, device="cuda")).raise_if_not()


def test_where_latents_stand() -> None:
    with pytest.raises(ValueError, match="latents are on cpu, the weights are on cuda"):
        small_vae(device="cuda").decode(noise(1, 16, 1, 2, 2))


@pytest.mark.parametrize("method", ["decode", "tiled_decode", "parallel_tiled_decode", "parallel_patch_decode"])
def test_uint8_is_the_rounded_float(method: str) -> None:
    vae = small_vae(device="cuda", **TILES)
    decode: Callable[..., Tensor] = getattr(vae, method)
    latents = noise(1, 16, 2, 9, 20, device="cuda")
    levels = decode(latents, output_type="uint8")
    assert levels.dtype == torch.uint8
    assert levels.is_cuda
    assert len(levels.unique()) > 50
    assert torch.equal(levels, to_uint8(decode(latents)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rank_in_every_mode(dtype: torch.dtype) -> None:
    """Patch on one rank is the plain decode; parallel tiles are the serial ones; a picture in one tile is whole."""
    vae = small_vae(dtype, "cuda", **TILES)
    latents = noise(2, 16, 2, 9, 20, dtype=dtype, device="cuda")
    whole = vae.decode(latents)
    assert torch.equal(vae.parallel_patch_decode(latents), whole)
    tiled = vae.tiled_decode(latents)
    assert torch.equal(vae.parallel_tiled_decode(latents), tiled)
    assert 0 < rms_error(tiled, whole) < 0.5 * float(whole.float().std())
    small = latents[..., :8, :8].contiguous()
    assert torch.equal(vae.tiled_decode(small), vae.decode(small))


def test_gpu_and_cpu_agree() -> None:
    """The same weights and latents, the same pixels, in fp64."""
    latents = noise(1, 16, 2, 5, 7, dtype=torch.float64)
    on_gpu = small_vae(torch.float64, "cuda").decode(latents.cuda()).cpu()
    assert max_error(on_gpu, small_vae(torch.float64).decode(latents)) <= 1e-6  # upsampling rounds to fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("what", ["decode", "encode"])
def test_peak_memory_is_within_the_estimate(what: str, frames: int, dtype: torch.dtype) -> None:
    """The full-size model on 512 x 512 pixels: what the estimate says is enough, and not wildly too much."""
    vae = full_size(dtype)
    engine = vae.engine
    value = noise(1, 16, frames, 64, 64, dtype=dtype, device="cuda")
    stages, sides, half = engine.decoder_stages, (64, 64), "decoder"
    if what == "encode":
        value = pictures(1, 3, 4 * frames - 3, 512, 512, dtype=dtype, device="cuda")
        stages, sides, half = engine.encoder_stages, (512, 512), "encoder"
    getattr(vae, what)(value[..., : sides[0] // 8 * 2, : sides[1] // 8 * 2])  # libraries take their workspaces
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    getattr(vae, what)(value)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    load = Load(half, plan.whole(stages, *sides), 1)
    estimate = engine.estimated_bytes(load, dtype, value.device, stream=frames > 1)
    estimate += 64 * 2**20  # the result, the features, what libraries work in
    print(f"{what} {frames} latent frames {dtype}: peak {peak / 2**20:.0f} MiB, estimate {estimate / 2**20:.0f} MiB")
    assert peak <= estimate
    assert estimate <= 6 * peak


def test_device_bytes() -> None:
    assert device_bytes(torch.device("cuda", 0)) == torch.cuda.get_device_properties(0).total_memory
    assert device_bytes(torch.device("cuda", 0)) > torch.cuda.mem_get_info(0)[0]
