"""SGLang's flags and its loader -> our VAE: config, weights, precision, what is refused, what is left to SGLang."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs SGLang: make test-sglang")

import torch
from safetensors.torch import load_file, save_file
from sglang.multimodal_gen.runtime.cache.conditioning import invalidate_conditioning_caches
from sglang.multimodal_gen.runtime.loader.component_loaders import vae_loader
from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import ComponentCheckpointUnsupportedError
from sglang.multimodal_gen.runtime.loader.utils import finalize_loaded_model, initialize_model
from sglang.multimodal_gen.runtime.managers.memory_managers.layerwise_offload import LayerwiseOffloadableModuleMixin
from sglang.multimodal_gen.runtime.models.vaes.common import ParallelTiledVAE
from sglang.multimodal_gen.runtime.models.vaes.fast_path_gate import use_vae_fast_path
from sglang.multimodal_gen.runtime.platforms.cuda import NonNvmlCudaPlatform
from sglang.multimodal_gen.runtime.platforms.rocm import RocmPlatform
from sglang.multimodal_gen.runtime.post_training.weights_updater import _load_weights_into_module
from sglang.multimodal_gen.runtime.utils.precision import temporary_module_dtype

from paravae.integrations.sglang_vae import ServedQwenImageVAE, ServedWanVAE, qwen_image_vae, wan_vae
from paravae.layers.dispatch import references_only
from paravae.vae.engines.fast_engine import FastEngine
from paravae.vae.engines.torch_engine import Networks
from tests.builders import max_error, noise, perturb
from tests.sglang.models import load, publish, small_config, small_wan_config, theirs

Serve = Callable[..., Any]
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def test_flags_reach_our_config(serve: Serve) -> None:
    """Every flag that means something here, through SGLang's parser and its loader."""
    vae = load(
        serve(
            *("--num-gpus", "4"),
            *("--vae-config.use-parallel-decode", "true"),
            *("--vae-config.parallel-decode-mode", "tiled"),
            *("--vae-config.tile-sample-min-height", "512"),
            *("--vae-config.tile-sample-min-width", "384"),
            *("--vae-config.tile-sample-stride-height", "448"),
            *("--vae-config.tile-sample-stride-width", "320"),
            *("--vae-config.use-tiling", "true"),
            *("--vae-config.load-encoder", "false"),
        )
    )
    assert isinstance(vae, ServedQwenImageVAE)
    assert vae.use_parallel_decode
    assert not vae.vae.config.use_parallel_decode, "alone until SGLang has a decode group"
    config = vae.vae.config
    assert (config.tile_sample_min_height, config.tile_sample_min_width) == (512, 384)
    assert (config.tile_sample_stride_height, config.tile_sample_stride_width) == (448, 320)
    assert (config.parallel_decode_mode, config.use_tiling, config.load_encoder) == ("tiled", True, False)
    assert config.arch_config.base_dim == 8
    assert vae.encoder is None


@pytest.mark.parametrize(
    ("mode", "ours"),
    [("auto", "auto"), ("patch", "patch"), ("spatial_shard", "patch"), ("spatial", "patch"), ("tiled", "tiled")],
)
def test_modes(mode: str, ours: str) -> None:
    assert qwen_image_vae(small_config(parallel_decode_mode=mode)).parallel_decode_mode == ours


def test_defaults_are_sglangs(serve: Serve) -> None:
    """Without a flag SGLang has parallel decode on, in mode auto."""
    vae = load(serve())
    assert vae.use_parallel_decode
    assert vae.parallel_decode_mode == "auto"
    assert vae.dtype == torch.bfloat16
    assert not load(serve("--vae-config.use-parallel-decode", "false")).use_parallel_decode


@pytest.mark.parametrize(("flag", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("offload", [False, True])
def test_precision_and_cpu_offload(flag: str, dtype: torch.dtype, offload: bool, serve: Serve) -> None:
    args = serve("--vae-precision", flag, *(["--vae-cpu-offload"] if offload else []))
    vae = load(args)
    assert {parameter.dtype for parameter in vae.parameters()} == {dtype}
    weights = load_file(f"{args.model_path}/{WEIGHTS}")
    assert vae.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name].to(dtype)) for name, tensor in vae.state_dict().items())


def test_weights_that_the_loader_maps_from_the_file(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host is short of memory, SGLang assigns tensors of the file instead of copying them."""
    monkeypatch.setattr(vae_loader, "keep_checkpoint_mapped", lambda **_: True)
    args = serve("--vae-precision", "fp32", "--vae-cpu-offload", "true")
    latents = noise(1, 16, 1, 6, 5)
    mapped = load(args).decode(latents)
    monkeypatch.undo()
    assert torch.equal(mapped, load(args).decode(latents))


def test_loaded_straight_to_the_device() -> None:
    """SGLang makes the module on the meta device and puts the file's tensors in place one by one."""
    config = small_config()
    vae = initialize_model(qwen_image_vae, {"config": config}, torch.float32, torch.device("meta"))
    slots = vae_loader._direct_gpu_vae_state_slots(vae, "vae")[1]
    truth = theirs()
    for name, tensor in truth.state_dict().items():
        module, local, _ = slots[name]
        module._parameters[local] = torch.nn.Parameter(tensor)
    finalize_loaded_model(vae)
    latents = noise(1, 16, 1, 5, 4)
    assert max_error(vae.decode(latents), truth.decode(latents)) <= 2e-5
    assert vae.shift_factor.flatten().tolist() == truth.shift_factor.flatten().tolist()


@references_only()  # the interpreter of Triton's kernels is slow
def test_fast_path_follows_the_weights() -> None:
    """The folded copies are made of the weights as they are at a decode: loaded, cast or laid out anew after it."""
    vae = with_fast_engine(qwen_image_vae(small_config()))
    latents = noise(1, 16, 1, 6, 5)
    truth = theirs()
    vae.load_state_dict(truth.state_dict())
    assert max_error(vae.decode(latents), truth.decode(latents)) <= 2e-5
    perturb(truth)
    vae.load_state_dict(truth.state_dict(), assign=True)
    assert max_error(vae.decode(latents), truth.decode(latents)) <= 2e-5
    with temporary_module_dtype(vae, torch.bfloat16) as cast:
        rough = cast.decode(latents)
    assert rough.dtype == torch.bfloat16
    assert 0 < max_error(rough, truth.decode(latents)) < 0.2
    assert max_error(vae.float().decode(latents), truth.to(torch.bfloat16).float().decode(latents)) <= 2e-5


def with_fast_engine(vae: Any) -> Any:
    """As on a GPU in bf16."""
    networks = Networks(vae.encoder, vae.quant_conv, vae.post_quant_conv, vae.decoder, temporal_ratio=4)
    vae.vae.use_engine(FastEngine(networks, everywhere=True, graphs=0))
    return vae


@references_only()
def test_weight_updates_while_serving_reach_the_fast_path() -> None:
    """SGLang's weight updater copies into ``.data``: PyTorch counts no change, and no address is new."""
    truth, latents, pixels = theirs(), noise(1, 16, 1, 5, 4), noise(1, 3, 1, 32, 24).clamp(-1, 1)
    vae = with_fast_engine(qwen_image_vae(small_config()))
    vae.load_state_dict(truth.state_dict())
    vae.decode(latents), vae.encode(pixels)
    for _ in range(2):
        perturb(truth)
        invalidate_conditioning_caches([vae])
        _load_weights_into_module(vae, iter(truth.state_dict().items()))
        assert max_error(vae.decode(latents), truth.decode(latents)) <= 2e-5
        assert max_error(vae.encode(pixels).mode(), truth.encode(pixels).mode()) <= 2e-5


@references_only()
@pytest.mark.parametrize("assign", [False, True])
def test_loaded_during_a_request(assign: bool) -> None:
    """A component that SGLang loads when it is first used is made under ``torch.inference_mode``."""
    truth, latents = theirs(), noise(1, 16, 1, 5, 4)
    with torch.inference_mode():
        vae = with_fast_engine(initialize_model(qwen_image_vae, {"config": small_config()}, torch.float32))
        vae.load_state_dict({name: tensor.clone() for name, tensor in truth.state_dict().items()}, assign=assign)
        assert max_error(vae.decode(latents), truth.decode(latents)) <= 2e-5
        vae.to(torch.bfloat16).to(torch.float32)
        assert max_error(vae.decode(latents), truth.to(torch.bfloat16).float().decode(latents)) <= 2e-5


def test_what_the_loader_does_after_loading_is_harmless(serve: Serve) -> None:
    args = serve("--vae-precision", "fp32")
    vae = load(args)
    latents, pixels = noise(1, 16, 2, 5, 6), noise(1, 3, 5, 40, 48).clamp(-1, 1)
    before, moments = vae.decode(latents), vae.encode(pixels).parameters
    assert vae_loader._convert_conv3d_weights_to_channels_last_3d(vae) > 50
    vae_loader._hold_decoder_weights_in_decode_dtype(vae, args, "vae")
    assert NonNvmlCudaPlatform.optimize_vae(vae) is vae
    assert RocmPlatform._replace_conv3d_with_conv2d(vae) == 0
    for enabled in (True, False):
        with use_vae_fast_path(vae, enabled):
            assert max_error(vae.decode(latents), before) <= 2e-5
    assert max_error(vae.encode(pixels).parameters, moments) <= 2e-5
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


def test_layerwise_offload_is_refused_not_broken() -> None:
    """It would take weights away between layers; ours are read as a whole. SGLang offloads the VAE whole instead."""
    vae = qwen_image_vae(small_config())
    assert isinstance(vae, ParallelTiledVAE)
    assert not isinstance(vae, LayerwiseOffloadableModuleMixin)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.pop("decoder.conv_in.weight"), "1 tensors .* missing, such as decoder.conv_in.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "of another network, such as extra"),
        (lambda tensors: tensors.update({"decoder.conv_in.bias": torch.zeros(3)}), "of another shape"),
    ],
)
def test_checkpoints_that_do_not_fit(spoil: Any, message: str, serve: Serve, tmp_path: Path) -> None:
    """SGLang loads without ``strict``, and would take diffusers' class after any other kind of error."""
    folder = publish(tmp_path / "Qwen-Image")
    tensors = load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ComponentCheckpointUnsupportedError, match=message):
        load(serve(model=folder))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vae-config.tile-sample-min-height", "100"), "tile_sample_min_height .* is 100 pixels"),
        (("--vae-config.tile-sample-min-height", "128"), "stride_height is 192 pixels, more than"),
        (("--vae-config.load-encoder", "false", "--vae-config.load-decoder", "false"), "nothing would be left"),
    ],
)
def test_flags_that_mean_nothing(flags: tuple[str, ...], message: str, serve: Serve) -> None:
    with pytest.raises(ComponentCheckpointUnsupportedError, match=message) as refused:
        load(serve(*flags))
    assert "PARAVAE_SGLANG=0" in str(refused.value)


# ---------------------------------------------------------------------------------- what is left to SGLang


def test_wan_2_1_is_ours_and_its_variants_are_sglangs(serve: Serve, tmp_path: Path) -> None:
    args = serve("--vae-precision", "fp32", model=publish(tmp_path / "Wan2.1-T2V-1.3B-Diffusers", "AutoencoderKLWan"))
    vae = load(args)
    assert isinstance(vae, ServedWanVAE)
    assert vae.encoder is None, "SGLang's text-to-video pipelines load no encoder"
    assert vae.decode(noise(1, 16, 1, 4, 4)).shape == (1, 3, 1, 32, 32)
    wan22 = {"is_residual": True, "patch_size": 2, "decoder_base_dim": 24, "in_channels": 12, "out_channels": 12}
    for name, value in wan22.items():
        config = small_wan_config()
        config.update_model_arch({name: value})
        assert type(wan_vae(config)).__module__.startswith("sglang."), name


def test_qwen_images_variants_are_sglangs() -> None:
    for name, value in {"is_residual": True, "input_channels": 4, "attn_scales": [1.0]}.items():
        config = small_config()
        config.update_model_arch({name: value})
        assert type(qwen_image_vae(config)).__module__.startswith("sglang."), name


def test_pipelines_of_other_models_keep_sglangs_class(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """MOVA decodes with AutoencoderKLWan on its first rank alone: a shared decode would wait there for ever."""
    from sglang.multimodal_gen.configs.pipeline_configs.mova import MOVAPipelineConfig

    args = serve()
    args.pipeline_config = MOVAPipelineConfig()
    assert type(wan_vae(small_wan_config())).__module__.startswith("sglang.")
    assert "not tried with MOVAPipelineConfig" in capsys.readouterr().out


def test_ignored_fields_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        qwen_image_vae(small_config(tile_sample_min_num_frames=8, use_temporal_tiling=True))
    assert "no use for tile_sample_min_num_frames = 8, blend_num_frames = -8, use_temporal_tiling = True" in caplog.text


def test_config_json_decides_the_network(serve: Serve, tmp_path: Path) -> None:
    folder = publish(tmp_path / "Qwen-Image", base_dim=16)
    assert json.loads((folder / "vae/config.json").read_text())["base_dim"] == 16
    assert load(serve(model=folder)).vae.config.arch_config.base_dim == 16
