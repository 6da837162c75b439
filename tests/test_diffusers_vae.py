"""The VAE for diffusers' pipelines, beside diffusers' own: what it returns, tells, takes and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paravae import AutoencoderKLQwenImage as Plain
from paravae import QwenImageVAEConfig, WanVAEConfig
from tests.builders import max_error, noise, pictures
from tests.diffusers_cases import diffusers, qwen_vae, wan_vae

pytest.importorskip("accelerate", reason="needs paravae[diffusers]")

from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from paravae.integrations import diffusers_vae
from paravae.integrations.driving import lead
from paravae.integrations.pipelines import paravae_vae_for

SMALL_TILES = (64, 64, 48, 48)


class Holder:
    """What ``paravae_vae_for`` asks a pipeline for."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae


def pair(make: Any = qwen_vae, config: Any = None) -> tuple[Any, Any]:
    """diffusers' and ours on its weights."""
    theirs = make()
    return theirs, paravae_vae_for(Holder(theirs), config)


both = pytest.mark.parametrize("make", [qwen_vae, wan_vae], ids=["qwen", "wan"])


@both
def test_returns_what_theirs_returns(make: Any) -> None:
    theirs, ours = pair(make)
    latents, pixels = noise(2, 16, 2, 5, 6), pictures(2, 3, 5, 40, 48)
    with torch.no_grad():
        wanted, moments = theirs.decode(latents), theirs.encode(pixels).latent_dist
    found = ours.decode(latents)
    assert type(found) is DecoderOutput
    assert max_error(found.sample, wanted.sample) <= 2e-5
    (as_tuple,) = ours.decode(latents, return_dict=False)
    assert torch.equal(as_tuple, found.sample)
    posterior = ours.encode(pixels)
    assert type(posterior) is AutoencoderKLOutput
    assert type(posterior.latent_dist) is DiagonalGaussianDistribution
    assert isinstance(ours.encode(pixels, return_dict=False), tuple)
    for name in ("mean", "logvar", "std", "var"):
        assert max_error(getattr(posterior.latent_dist, name), getattr(moments, name)) <= 2e-5
    drawn, wanted_draw = (d.sample(torch.Generator().manual_seed(1)) for d in (posterior.latent_dist, moments))
    assert max_error(drawn, wanted_draw) <= 2e-5
    assert max_error(posterior.latent_dist.kl(), moments.kl()) <= 1e-2 * float(moments.kl().abs().max())
    with torch.no_grad():
        assert max_error(ours(pixels).sample, theirs(pixels).sample) <= 2e-5
        seeds = [torch.Generator().manual_seed(2) for _ in range(2)]
        again, wanted_again = (v(pixels, True, False, seed)[0] for v, seed in zip((ours, theirs), seeds, strict=True))
    assert max_error(again, wanted_again) <= 2e-5


@both
def test_says_what_theirs_says(make: Any) -> None:
    """Every field of config, and every attribute that pipelines read."""
    theirs, ours = pair(make)
    assert dict(ours.config) == dict(theirs.config)
    assert ours.config.get("z_dim") == ours.config["z_dim"] == ours.config.z_dim == 16
    assert isinstance(ours.config.latents_mean, list)
    names = ["dtype", "device", "temperal_downsample", "spatial_compression_ratio", "use_tiling", "use_slicing"]
    names += ["z_dim", *diffusers_vae._TILE_PX, "temperal_upsample", "config_name"]
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.state_dict()) == [name for name in ours.state_dict() if name in theirs.state_dict()]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert type(ours).__name__ == type(theirs).__name__
    assert isinstance(ours, diffusers.ModelMixin)


def test_weights_are_held_once() -> None:
    """Whatever moves or casts ours does so to theirs, too; and nothing else of theirs is touched."""
    theirs = qwen_vae()
    theirs.decoder.conv_in.weight.requires_grad_(False)
    wanted = {name: weight.requires_grad for name, weight in theirs.named_parameters()}
    ours = paravae_vae_for(Holder(theirs))
    assert {name: weight.requires_grad for name, weight in theirs.named_parameters()} == wanted
    mine = dict(ours.named_parameters())
    assert all(mine[name] is weight for name, weight in theirs.named_parameters())
    ours.to(torch.float64)
    assert theirs.dtype == ours.dtype == ours.paravae.dtype == torch.float64
    latents = noise(1, 16, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        assert max_error(ours.decode(latents).sample, theirs.decode(latents).sample) <= 1e-10
    assert not ours.decode(latents.requires_grad_()).sample.requires_grad


def test_bfloat16_is_no_further_from_the_truth() -> None:
    theirs, ours = pair()
    latents = noise(1, 16, 1, 8, 8)
    truth = ours.decode(latents).sample
    ours.to(torch.bfloat16)
    with torch.no_grad():
        errors = [max_error(vae.decode(latents.bfloat16()).sample, truth) for vae in (ours, theirs)]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_tiling() -> None:
    """Tiles of paravae: of the whole size, clamped; set anew by each call, checked; off again exactly."""
    theirs, ours = pair()
    latents = 3 * noise(1, 16, 1, 20, 23)
    whole = ours.decode(latents).sample
    ours.enable_tiling(*SMALL_TILES)
    assert [getattr(ours, name) for name in diffusers_vae._TILE_PX] == list(SMALL_TILES)
    tiled = ours.decode(latents).sample
    assert tiled.shape == whole.shape == (1, 3, 1, 160, 184)
    assert ours.paravae.last_choice.mode == "tiled"
    assert torch.equal(tiled, ours.paravae.tiled_decode(latents))
    assert -1 <= float(tiled.min()) <= float(tiled.max()) <= 1
    assert 0 < max_error(tiled, whole) < 2
    ours.disable_tiling()
    assert torch.equal(ours.decode(latents).sample, whole)
    with pytest.raises(ValueError, match=r"tile_sample_min_height .* is 100 pixels, needs a positive multiple of 8"):
        ours.enable_tiling(100)
    assert not ours.use_tiling
    with pytest.raises(AttributeError):  # no silent other way
        ours.tile_sample_min_height = 512
    theirs.enable_tiling(*SMALL_TILES)
    theirs.enable_slicing()
    taken_over = paravae_vae_for(Holder(theirs))
    assert taken_over.use_slicing
    assert torch.equal(taken_over.decode(latents).sample, tiled)
    assert paravae_vae_for(Holder(qwen_vae()), QwenImageVAEConfig(use_tiling=True)).use_tiling


def test_slicing_decodes_one_image_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair()
    latents, pixels = noise(3, 16, 1, 4, 4), pictures(3, 3, 1, 16, 16)
    whole, mean = ours.decode(latents).sample, ours.encode(pixels).latent_dist.mean
    batches: list[int] = []
    for name in ("decode", "encode"):
        real = getattr(ours.paravae, name)
        spy = lambda x, real=real, **o: (batches.append(len(x)), real(x, **o))[1]  # noqa: E731
        monkeypatch.setattr(ours.paravae, name, spy)
    ours.enable_slicing()
    assert max_error(ours.decode(latents).sample, whole) <= 2e-5
    assert max_error(ours.encode(pixels).latent_dist.mean, mean) <= 2e-5
    ours.disable_slicing()
    ours.decode(latents)
    assert batches == [1] * 6 + [3]


def test_four_channels() -> None:
    """Qwen-Image-Layered's VAE has RGB and transparency."""
    theirs, ours = pair(lambda: qwen_vae(input_channels=4))
    latents, pixels = noise(1, 16, 1, 4, 4), pictures(1, 4, 1, 32, 32)
    with torch.no_grad():
        assert max_error(ours.decode(latents).sample, theirs.decode(latents).sample) <= 2e-5
        wanted = theirs.encode(pixels).latent_dist.mean
    assert max_error(ours.encode(pixels).latent_dist.mean, wanted) <= 2e-5


@both
def test_saved_folder_is_read_by_all(make: Any, tmp_path: Path) -> None:
    theirs, ours = pair(make)
    latents = noise(1, 16, 1, 4, 4)
    wanted = ours.decode(latents).sample
    ours.save_pretrained(tmp_path)
    read = type(theirs).from_pretrained(tmp_path)
    assert dict(read.config)["latents_mean"] == theirs.config.latents_mean
    with torch.no_grad():
        assert max_error(read.decode(latents).sample, wanted) <= 2e-5
    loaded = type(ours).from_pretrained(tmp_path, vae_config=WanVAEConfig(), torch_dtype=torch.float32)
    assert max_error(loaded.decode(latents).sample, wanted) <= 2e-5
    if make is qwen_vae:
        assert max_error(Plain.from_pretrained(tmp_path).decode(latents), wanted) <= 2e-5


def test_input_that_does_not_fit() -> None:
    _, ours = pair()
    for latents, words in (
        (noise(1, 16, 4, 4), r"need \[B, 16, T, h, w\]"),
        (noise(1, 16, 1, 4, 4).bfloat16(), "latents are torch.bfloat16, the weights are torch.float32"),
        (noise(1, 16, 1, 4, 4) * torch.nan, "latents hold 256 NaN"),
        ([1.0], "latents are a list"),
    ):
        with pytest.raises(ValueError, match=words):
            ours.decode(latents)
    with pytest.raises(ValueError, match="pixels are 20 x 16"):
        ours.encode(pictures(1, 3, 1, 20, 16))
    without = paravae_vae_for(Holder(qwen_vae()), QwenImageVAEConfig(load_encoder=False))
    assert max_error(without.decode(noise(1, 16, 1, 4, 4)).sample, ours.decode(noise(1, 16, 1, 4, 4)).sample) == 0
    with pytest.raises(ValueError, match="load_encoder=False"):
        without.encode(pictures(1, 3, 1, 16, 16))


def _other_vae() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)


def _wan22() -> Any:
    return wan_vae(is_residual=True, z_dim=4, patch_size=2, in_channels=12, out_channels=12, latents_mean=[0.0] * 4)


def _meta() -> Any:
    return qwen_vae().to("meta")


def _mixed() -> Any:
    vae = qwen_vae()
    vae.encoder.to(torch.bfloat16)
    return vae


def _adapted() -> Any:
    vae = qwen_vae()
    vae.quant_conv.extra = nn.Parameter(torch.zeros(1))
    return vae


def _hooked() -> Any:
    vae = qwen_vae()
    vae.decoder.register_forward_hook(lambda *_: None)
    return vae


def _cast_by_layers() -> Any:
    vae = qwen_vae()
    vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return vae


class _Quantized(nn.Parameter):
    """As the libraries make them: parameters of another class."""


def _quantized() -> Any:
    vae = qwen_vae()
    vae.decoder.conv_in.weight = _Quantized(vae.decoder.conv_in.weight.data)
    return vae


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_other_vae, "AutoencoderKL, need diffusers' AutoencoderKLQwenImage or AutoencoderKLWan"),
        (_wan22, "another network than Qwen-Image's and Wan 2.1's"),
        (_meta, "weights of pipe.vae are on the meta device.*load them first"),
        (_mixed, r"of several dtypes \(torch.bfloat16, torch.float32\)"),
        (lambda: qwen_vae().to(torch.float8_e4m3fn), "weights of pipe.vae are torch.float8_e4m3fn, need one of"),
        (_adapted, r"1 unknown \(such as \['quant_conv.extra'\]\)"),
        (_hooked, r"pipe.vae has hooks \(decoder, 1 in all\)"),
        (_cast_by_layers, "pipe.vae has hooks"),
        (_quantized, r"pipe.vae is quantized \(such as \['decoder.conv_in.weight'\]\)"),
        (lambda: torch.compile(qwen_vae()), "OptimizedModule.*compiled, wrapped or accelerated"),
        (lambda: paravae_vae_for(Holder(qwen_vae())), "paravae.integrations.*compiled, wrapped or accelerated"),
        (lambda: None, "Holder has no vae"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_taken(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        paravae_vae_for(Holder(make()))


def test_config_of_another_kind() -> None:
    with pytest.raises(ValueError, match="vae_config is a dict, needs a QwenImageVAEConfig"):
        pair(config={"use_parallel_decode": True})


def test_lead_on_one_rank_runs_the_work() -> None:
    _, ours = pair(config=QwenImageVAEConfig(use_parallel_decode=True))
    assert lead(ours, lambda: ours.decode(noise(1, 16, 1, 4, 4)).sample.shape) == (1, 3, 1, 32, 32)
    with pytest.raises(ValueError, match="vae is a AutoencoderKLQwenImage; lead needs"):
        lead(qwen_vae(), lambda: None)
