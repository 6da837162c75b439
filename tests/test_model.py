"""The networks against diffusers', weights shared and perturbed; the streaming state; gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import nn

from paravae import AutoencoderKLQwenImage, AutoencoderKLWan, QwenImageVAEArchConfig, WanVAEConfig
from paravae.configs import WanVAEArchConfig
from paravae.vae import plan
from tests.builders import max_error, noise, perturb, pictures, small_vae

BOUNDS = {torch.float32: 2e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def diffusers_classes() -> dict[str, Callable[..., nn.Module]]:
    from diffusers import AutoencoderKLQwenImage as Qwen
    from diffusers import AutoencoderKLWan as Wan

    return {"qwen": Qwen, "wan": Wan}


@lru_cache(maxsize=4)
def oracle(name: str, dtype: torch.dtype) -> nn.Module:
    """diffusers' model, small, with random weights."""
    torch.manual_seed(0)
    model = diffusers_classes()[name](base_dim=8)
    perturb(model)
    return model.to(dtype).eval().requires_grad_(False)


@lru_cache(maxsize=4)
def ours(name: str, dtype: torch.dtype) -> AutoencoderKLQwenImage:
    """Our model with the oracle's weights."""
    if name == "wan":
        vae: AutoencoderKLQwenImage = AutoencoderKLWan(WanVAEConfig(arch_config=WanVAEArchConfig(base_dim=8)))
    else:
        vae = small_vae()
    vae = vae.to(dtype)
    vae.load_state_dict(oracle(name, dtype).state_dict())
    return vae


@DTYPES
@pytest.mark.parametrize("name", ["qwen", "wan"])
@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"),
    [(1, 1, 1, 1), (2, 1, 5, 7), (1, 1, 16, 12), (1, 2, 5, 7), (2, 2, 1, 1), (1, 5, 3, 2)],
)
def test_decode_is_diffusers(name: str, dtype: torch.dtype, batch: int, frames: int, height: int, width: int) -> None:
    latents = noise(batch, 16, frames, height, width, dtype=dtype)
    truth = oracle(name, dtype).decode(latents).sample
    pixels = ours(name, dtype).decode(latents)
    assert pixels.shape == (batch, 3, 4 * frames - 3, 8 * height, 8 * width)
    assert pixels.dtype == dtype
    assert truth.std() > 0.05
    assert (truth.abs() == 1).float().mean() < 0.2, "a clamped oracle would hide errors"
    assert max_error(pixels, truth) <= BOUNDS[dtype]


@DTYPES
@pytest.mark.parametrize("name", ["qwen", "wan"])
@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"),
    [(1, 1, 8, 8), (2, 1, 40, 56), (1, 5, 40, 56), (2, 5, 8, 8), (1, 17, 24, 16)],
)
def test_encode_is_diffusers(name: str, dtype: torch.dtype, batch: int, frames: int, height: int, width: int) -> None:
    pixels = pictures(batch, 3, frames, height, width, dtype=dtype)
    truth = oracle(name, dtype).encode(pixels).latent_dist
    posterior = ours(name, dtype).encode(pixels)
    assert posterior.mean.shape == (batch, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
    assert truth.mean.std() > 0.01
    assert truth.logvar.abs().max() < 20, "a clamped oracle would hide errors"
    assert max_error(posterior.mean, truth.mean) <= BOUNDS[dtype]
    assert max_error(posterior.logvar, truth.logvar) <= BOUNDS[dtype]


def test_clamps_as_diffusers_does() -> None:
    latents = 30 * noise(1, 16, 1, 4, 4)
    vae, reference = small_vae(), oracle.__wrapped__("qwen", torch.float32)
    vae.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for model in (vae, reference):
            model.decoder.conv_out.bias.fill_(1.0)
        pixels, truth = vae.decode(latents), reference.decode(latents).sample
    assert (truth == 1).float().mean() > 0.05
    assert pixels.max() == 1.0
    assert max_error(pixels, truth) <= 2e-5


@pytest.mark.parametrize("name", ["qwen", "wan"])
def test_state_dicts_go_both_ways(name: str) -> None:
    vae, reference = ours(name, torch.float32), oracle(name, torch.float32)
    assert len(vae.state_dict()) == 194
    assert vae.state_dict().keys() == reference.state_dict().keys()
    changed = {key: tensor + 1 for key, tensor in vae.state_dict().items()}
    fresh = diffusers_classes()[name](base_dim=8)
    fresh.load_state_dict(changed)
    assert all(torch.equal(tensor, changed[key]) for key, tensor in fresh.state_dict().items())


@pytest.mark.parametrize(("name", "ours_full"), [("qwen", AutoencoderKLQwenImage), ("wan", AutoencoderKLWan)])
def test_full_size_is_the_published_model(name: str, ours_full: type[AutoencoderKLQwenImage]) -> None:
    """194 tensors of the same names and shapes, 126,892,531 numbers; none of them allocated here."""
    with torch.device("meta"):
        vae, reference = ours_full(), diffusers_classes()[name]()
    shapes = {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    assert len(shapes) == 194
    assert sum(parameter.numel() for parameter in vae.parameters()) == 126_892_531
    assert sum(parameter.numel() for parameter in vae.decoder.parameters()) == 73_295_331
    assert not any(parameter.requires_grad for parameter in vae.parameters())


@DTYPES
def test_frames_stream(dtype: torch.dtype) -> None:
    """The engine gives a video frame by frame: what came before a cut does not depend on what follows, and the
    pieces are those of the whole decode."""
    vae = ours("qwen", dtype)
    latents = noise(1, 16, 4, 3, 5, dtype=dtype)
    trace = plan.whole(vae.engine.decoder_stages, 3, 5)
    pieces = list(vae.engine.decode(latents, trace))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4]
    whole = vae.decode(latents)
    assert torch.equal(torch.cat(pieces, dim=2), whole)
    assert max_error(vae.decode(latents[:, :, :2]), whole[:, :, :5]) <= BOUNDS[dtype]
    assert max_error(vae.decode(latents[:, :, :1]), whole[:, :, :1]) <= BOUNDS[dtype]
    assert max_error(vae.decode(latents[:, :, 1:2]), whole[:, :, 1:2]) > 1e-3, "later frames remember the earlier"


def test_a_stream_is_not_refused_for_its_length() -> None:
    """What is handed out need not be held: only what a latent frame takes counts against the limit."""
    latents = noise(1, 16, 24, 2, 3)
    vae = small_vae()
    gib = []
    for frames in (2, 24):
        vae.decode(latents[:, :, :frames])
        assert vae.last_choice is not None
        gib.append(vae.last_choice.gib)
    assert gib[0] < gib[1]
    vae = small_vae(memory_limit_gib=sum(gib) / 2)
    with pytest.raises(ValueError, match="memory_limit_gib"):
        vae.decode(latents)
    frames: list[torch.Tensor] = []
    vae.decode(latents, on_frames=frames.append)
    assert torch.equal(torch.cat(frames, dim=2), small_vae().decode(latents))


def test_two_decodes_share_no_state() -> None:
    """Streams that are interleaved do not disturb each other, nor does one that was left unfinished."""
    vae = ours("qwen", torch.float32)
    a, b = (noise(1, 16, 3, 2, 3, seed=seed) for seed in (1, 2))
    trace = plan.whole(vae.engine.decoder_stages, 2, 3)
    whole = [torch.cat(list(vae.engine.decode(latents, trace)), dim=2) for latents in (a, b)]
    unfinished = vae.engine.decode(a, trace)
    next(unfinished)
    together = list(zip(vae.engine.decode(a, trace), vae.engine.decode(b, trace), strict=True))
    for index in (0, 1):
        assert torch.equal(torch.cat([pair[index] for pair in together], dim=2), whole[index])


@pytest.mark.parametrize("frames", [1, 2])
def test_engine_is_differentiable(frames: int) -> None:
    """Gradients to latents and weights, checked against a difference quotient in fp64."""
    vae = small_vae(torch.float64)
    latents = noise(1, 16, frames, 2, 3, dtype=torch.float64).requires_grad_()
    vae.decoder.conv_in.weight.requires_grad_()
    trace = plan.whole(vae.engine.decoder_stages, 2, 3)
    weights = noise(1, 3, 4 * frames - 3, 16, 24, dtype=torch.float64, seed=5)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return (torch.cat(list(vae.engine.decode(z, trace)), dim=2) * weights).sum()

    loss(latents).backward()
    assert latents.grad is not None
    assert vae.decoder.conv_in.weight.grad.abs().max() > 0
    direction, step = noise(*latents.shape, dtype=torch.float64, seed=6), 1e-2
    with torch.no_grad():  # upsampling rounds to fp32, so the step cannot be as small as fp64 would allow
        quotient = (loss(latents + step * direction) - loss(latents - step * direction)) / (2 * step)
    assert abs(quotient - (latents.grad * direction).sum()) <= 2e-3 * abs(quotient)


def test_decode_keeps_no_gradients() -> None:
    latents = noise(1, 16, 1, 2, 2).requires_grad_()
    assert not small_vae().decode(latents).requires_grad


def test_other_architectures() -> None:
    """Levels, blocks and time steps are free, as far as diffusers' class goes."""
    from diffusers import AutoencoderKLQwenImage as Qwen

    options = {"base_dim": 4, "z_dim": 6, "dim_mult": [1, 2, 2, 4], "num_res_blocks": 1}
    options |= {"temperal_downsample": [True, False, True], "latents_mean": [0.0] * 6, "latents_std": [1.0] * 6}
    torch.manual_seed(0)
    reference = Qwen(**options).double().eval()
    perturb(reference)
    vae = small_vae(torch.float64, arch=QwenImageVAEArchConfig(**options))
    vae.load_state_dict(reference.state_dict())
    latents = noise(1, 6, 2, 3, 4, dtype=torch.float64)
    assert max_error(vae.decode(latents), reference.decode(latents).sample) <= 1e-10


def test_normalised_latents() -> None:
    """Latents as pipelines hold them: (z - mean) / std by channel, with the published constants."""
    vae = small_vae(torch.float64)
    latents = noise(2, 16, 1, 2, 2, dtype=torch.float64)
    normalised = vae.normalize(latents)
    assert max_error(normalised[:, 0], (latents[:, 0] + 0.7571) / 2.8184) <= 1e-12
    assert max_error(normalised[:, 15], (latents[:, 15] + 0.2921) / 1.9160) <= 1e-12
    assert max_error(vae.denormalize(normalised), latents) <= 1e-12
    bare = small_vae(arch=QwenImageVAEArchConfig(base_dim=8, latents_mean=(), latents_std=()))
    with pytest.raises(ValueError, match="no latents_mean and latents_std"):
        bare.normalize(latents)
