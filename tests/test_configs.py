"""Configs check themselves, cannot be changed, and follow SGLang's defaults."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from paravae import QwenImageVAEArchConfig, QwenImageVAEConfig, VAEArchConfig, VAEConfig, WanVAEConfig
from paravae.configs import TrtVAEConfig, WanVAEArchConfig

CONFIGS = (VAEConfig, QwenImageVAEConfig, WanVAEConfig)
ARCHES = (VAEArchConfig, QwenImageVAEArchConfig, WanVAEArchConfig)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"parallel_decode_mode": "fast"}, ("'fast'", "auto, patch, spatial_shard, tiled")),
        ({"tile_sample_stride_height": 264}, ("264", "tile_sample_min_height (256)", "at most 256")),
        ({"tile_sample_min_width": 128}, ("tile_sample_stride_width is 192", "tile_sample_min_width (128)")),
        ({"tile_sample_min_height": 260}, ("tile_sample_min_height", "260", "multiple of 8")),
        ({"tile_sample_stride_width": 4}, ("tile_sample_stride_width", "4 pixels", "multiple of 8")),
        ({"tile_sample_stride_height": 0}, ("0 pixels", "positive multiple of 8")),
        ({"tile_sample_min_width": -256}, ("-256", "positive multiple of 8")),
        ({"memory_limit_gib": 0.0}, ("memory_limit_gib is 0.0", "positive")),
        ({"memory_limit_gib": float("nan")}, ("memory_limit_gib is nan", "positive")),
        ({"memory_limit_gib": float("inf")}, ("memory_limit_gib is inf", "positive")),
        ({"vae_type": "trt"}, ("vae_type (--vae-config.vae-type) is 'trt'", "one of pytorch, tensorrt")),
        ({"vae_type": "tensorrt"}, ("--vae-config.vae-type", "--vae-config.trt-vae-config.trt-engine-path DIR")),
        ({"trt_vae_config": {"strict": True}}, ("trt_vae_config is {'strict': True}, needs a TrtVAEConfig",)),
        ({"trt_vae_config": TrtVAEConfig(warm_up=("64x64", "64x36"))}, ("warm-up) has 64x36", "multiples of 8")),
        ({"trt_vae_config": TrtVAEConfig(warm_up=("0x64",))}, ("has 0x64", "positive multiples of 8")),
        ({"use_tiling": "no"}, ("use_tiling (--vae-config.use-tiling) is 'no', needs true or false",)),
        ({"cuda_graphs": True}, ("cuda_graphs (--vae-config.cuda-graphs) is True, needs a whole number",)),
        ({"load_encoder": False, "load_decoder": False}, ("load_encoder", "load_decoder", "both off")),
    ],
)
@pytest.mark.parametrize("config_class", CONFIGS)
def test_refuses(config_class: type[VAEConfig], options: dict[str, Any], fragments: tuple[str, ...]) -> None:
    """When made and when changed, in the same words."""
    for make in (lambda: config_class(**options), lambda: replace(config_class(), **options)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is checked below
            make()
        assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"trt_engine_path": " "}, ("(--vae-config.trt-vae-config.trt-engine-path) is empty", "a folder")),
        ({"trt_engine_path": 7}, ("(--vae-config.trt-vae-config.trt-engine-path) is 7, needs text",)),
        ({"max_resident_bytes": 0}, ("(--vae-config.trt-vae-config.max-resident-bytes) is 0", "positive")),
        ({"max_resident_bytes": 2.5e9}, ("is 2500000000.0, needs a whole number",)),
        ({"flavour": "rtx"}, ("(--vae-config.trt-vae-config.flavour) is 'rtx'", "auto, tensorrt, tensorrt_rtx")),
        ({"warm_up": "64x64"}, ("(--vae-config.trt-vae-config.warm-up) is '64x64', needs a list",)),
        ({"warm_up": ["64x64", "64 x 64"]}, ("warm-up): got '64 x 64'", "WIDTHxHEIGHT")),
        ({"multi_profile": None}, ("(--vae-config.trt-vae-config.multi-profile) is None, needs true or false",)),
    ],
)
def test_trt_refuses(options: dict[str, Any], fragments: tuple[str, ...]) -> None:
    for make in (lambda: TrtVAEConfig(**options), lambda: replace(TrtVAEConfig(), **options)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is checked below
            make()
        assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_trt_config() -> None:
    """Defaults, and what is derived; changed from within, the outer checks run again."""
    trt = TrtVAEConfig(trt_engine_path="engines", warm_up=["1664x928", "64x0064", "64x64"])  # type: ignore[arg-type]
    assert (trt.warm_up, trt.warm_up_sizes) == (("1664x928", "64x64"), ((1664, 928), (64, 64)))
    config = VAEConfig(vae_type="tensorrt", trt_vae_config=trt)
    assert hash(config) == hash(replace(config, trt_vae_config=replace(trt)))
    with pytest.raises(ValueError, match="trt-engine-path DIR"):
        replace(config, trt_vae_config=replace(trt, trt_engine_path=None))
    plain = VAEConfig()
    assert (plain.vae_type, plain.trt_vae_config) == ("pytorch", TrtVAEConfig())
    assert (plain.trt_vae_config.strict, plain.trt_vae_config.verify_hashes) == (False, True)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"base_dim": 0}, ("base_dim must be at least 1, got 0",)),
        ({"z_dim": -1}, ("z_dim must be at least 1, got -1",)),
        ({"num_res_blocks": 0}, ("num_res_blocks",)),
        ({"input_channels": 0}, ("input_channels",)),
        ({"dim_mult": [1, 2]}, ("temperal_downsample has 3 entries", "[1, 2] needs 1")),
        ({"temperal_downsample": [True]}, ("temperal_downsample has 1 entries", "needs 3")),
        ({"latents_mean": [0.0] * 15}, ("latents_mean has 15 entries", "z_dim is 16")),
        ({"latents_std": [1.0] * 4}, ("latents_std has 4 entries", "z_dim is 16")),
    ],
)
@pytest.mark.parametrize("arch_class", ARCHES)
def test_arch_refuses(arch_class: type[VAEArchConfig], options: dict[str, Any], fragments: tuple[str, ...]) -> None:
    for make in (lambda: arch_class(**options), lambda: replace(arch_class(), **options)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is checked below
            make()
        assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize("config_class", [*CONFIGS, *ARCHES, TrtVAEConfig])
def test_frozen_and_named(config_class: type) -> None:
    config = config_class()
    for field in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, None)
    with pytest.raises(TypeError):
        config_class(fields(config)[0].default)  # fields go by name


@pytest.mark.parametrize("config_class", [*CONFIGS, *ARCHES, TrtVAEConfig])
def test_every_field_has_its_line_of_help(config_class: type) -> None:
    for field in fields(config_class):
        if field.name not in ("arch_config", "trt_vae_config"):
            assert len(field.metadata["help"]) > 10, field.name
            assert "\n" not in field.metadata["help"], field.name


@pytest.mark.parametrize("config_class", CONFIGS)
def test_defaults_are_sglangs_but_parallel_is_off(config_class: type[VAEConfig]) -> None:
    config = config_class()
    assert (config.tile_sample_min_height, config.tile_sample_min_width) == (256, 256)
    assert (config.tile_sample_stride_height, config.tile_sample_stride_width) == (192, 192)
    assert (config.load_encoder, config.load_decoder) == (True, True)
    assert (config.use_parallel_decode, config.parallel_decode_mode) == (False, "auto")
    assert config.use_tiling is False
    assert config.memory_limit_gib is None


def test_architectures() -> None:
    """Qwen-Image's and Wan 2.1's are one, with 16 constants each of mean and deviation."""
    qwen, wan = QwenImageVAEConfig().arch_config, WanVAEConfig().arch_config
    assert {f.name: getattr(qwen, f.name) for f in fields(qwen)} == {f.name: getattr(wan, f.name) for f in fields(wan)}
    assert (qwen.base_dim, qwen.z_dim, qwen.dim_mult, qwen.num_res_blocks) == (96, 16, (1, 2, 4, 4), 2)
    assert qwen.temperal_downsample == (False, True, True)
    assert (len(qwen.latents_mean), len(qwen.latents_std)) == (16, 16)
    assert (qwen.latents_mean[0], qwen.latents_std[-1]) == (-0.7571, 1.9160)


def test_derived_values() -> None:
    arch = VAEArchConfig()
    assert (arch.spatial_ratio, arch.temporal_ratio) == (8, 4)
    assert [arch.pixel_frames(t) for t in (1, 2, 5)] == [1, 5, 17]
    flat = VAEArchConfig(dim_mult=[1, 2, 2], temperal_downsample=[False, True])
    assert (flat.spatial_ratio, flat.temporal_ratio, flat.pixel_frames(3)) == (4, 2, 5)
    assert flat.dim_mult == (1, 2, 2)


def test_spatial_shard_is_patch() -> None:
    assert VAEConfig(parallel_decode_mode="spatial_shard").exact_mode == "patch"
    assert VAEConfig(parallel_decode_mode="tiled").exact_mode == "tiled"
