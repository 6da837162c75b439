"""What SGLang's own stages make of our VAE on one rank, beside what they make of SGLang's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs SGLang: make test-sglang")

import torch
import zmq
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from sglang.multimodal_gen.runtime.cache.conditioning import ConditioningCache
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType, filter_modules_for_role
from sglang.multimodal_gen.runtime.disaggregation.scheduler_mixin import SchedulerDisaggMixin
from sglang.multimodal_gen.runtime.disaggregation.transport.codec import unpack_tensors
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import StageParallelismType
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.image_encoding import ImageVAEEncodingStage

from paravae.integrations.sglang_vae import qwen_image_vae, wan_vae
from tests.builders import max_error, noise, pictures
from tests.sglang.models import load, publish, request, small_config, small_wan_config, their_wan, theirs

Serve = Callable[..., Any]
FP32 = ("--vae-precision", "fp32")


def ours(**options: Any) -> Any:
    vae = qwen_image_vae(small_config(**options))
    vae.load_state_dict(theirs().state_dict())
    return vae.eval()


def our_wan(**options: Any) -> Any:
    vae = wan_vae(small_wan_config(**options))
    vae.load_state_dict(their_wan().state_dict())
    return vae.eval()


@pytest.mark.parametrize("shape", [(1, 1, 6, 5), (2, 1, 4, 7), (1, 2, 3, 4)], ids=["image", "batch", "video"])
def test_decode_and_encode_equal_sglangs(shape: tuple[int, ...]) -> None:
    batch, frames, height, width = shape
    latents = noise(batch, 16, frames, height, width)
    pixels = pictures(batch, 3, 4 * frames - 3, 8 * height, 8 * width)
    for vae, truth in ((ours(), theirs()), (our_wan(), their_wan())):
        assert max_error(vae.decode(latents), truth.decode(latents)) <= 2e-5
        posterior, expected = vae.encode(pixels), truth.encode(pixels)
        assert type(posterior) is DiagonalGaussianDistribution
        assert max_error(posterior.mode(), expected.mode()) <= 2e-5
        assert max_error(posterior.logvar, expected.logvar) <= 2e-5
        seeded = [dist.sample(torch.Generator().manual_seed(3)) for dist in (posterior, expected)]
        assert max_error(*seeded) <= 1e-4


def test_attributes_that_stages_touch() -> None:
    for vae, truth in ((ours(), theirs()), (our_wan(), their_wan())):
        for name in ("z_dim", "temperal_downsample", "spatial_compression_ratio", "temporal_compression_ratio"):
            theirs_value = getattr(truth, name)
            assert getattr(vae, name) == (list(theirs_value) if isinstance(theirs_value, tuple) else theirs_value), name
        for name in ("use_parallel_decode", "use_tiling", "supports_decode_on_frames", "device"):
            assert getattr(vae, name) == getattr(truth, name), name
        assert list(vae.latents_mean) == list(truth.latents_mean)
        assert torch.equal(vae.shift_factor, truth.shift_factor)
        assert type(vae.config) is type(truth.config)
        for name in ("latents_mean", "latents_std", "z_dim", "patch_size", "scale_factor_spatial"):
            assert getattr(vae.config, name) == getattr(truth.config, name), name
        assert vae.state_dict().keys() == truth.state_dict().keys()
        scaling = (vae.scaling_factor, truth.scaling_factor)
        assert torch.equal(*scaling) if isinstance(scaling[0], torch.Tensor) else scaling[0] == scaling[1]


def test_decoding_stage(serve: Serve) -> None:
    """The stage denormalises, decodes and maps to [0, 1]; fp32, bf16 weights, and a decode precision of its own."""
    latents = noise(1, 16, 1, 6, 5)
    for flags, tolerance in ((FP32, 2e-5), ((), 0.05), (("--vae-decode-precision", "fp32"), 2e-5)):
        args = serve(*flags)
        vae, truth = load(args), theirs(args.pipeline_config.vae_config)
        truth.load_state_dict(vae.state_dict())
        truth.to(vae.dtype)
        stages = [DecodingStage(vae), DecodingStage(truth)]
        mine, expected = (stage(request(latents.to(vae.dtype)), args).output for stage in stages)
        assert mine.dtype == expected.dtype
        assert mine.shape == (1, 3, 1, 48, 40)
        assert max_error(mine, expected) <= tolerance, flags
        assert vae.dtype == truth.post_quant_conv.weight.dtype


def test_trajectories_and_videos_through_the_stage(serve: Serve) -> None:
    args = serve(*FP32)
    vae, truth = load(args), theirs(args.pipeline_config.vae_config)
    truth.load_state_dict(vae.state_dict())
    latents = noise(1, 16, 2, 5, 4)
    steps = noise(1, 2, 16, 2, 5, 4, seed=1)
    results = [
        DecodingStage(each)(request(latents, return_trajectory_decoded=True, trajectory_latents=steps), args)
        for each in (vae, truth)
    ]
    assert max_error(results[0].output, results[1].output) <= 2e-5
    for mine, expected in zip(*(result.trajectory_decoded for result in results), strict=True):
        assert max_error(mine, expected) <= 2e-5


def test_autocast_is_set_aside() -> None:
    """With autocast on, SGLang's latents come in any dtype and the weights stay in theirs: that is what runs."""
    vae, latents = ours(), noise(1, 16, 1, 5, 4)
    plain = vae.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.decode(latents), plain)
        assert vae.decode(latents.bfloat16()).dtype == torch.float32


def test_torch_compile_leaves_it_alone(serve: Serve) -> None:
    args = serve(*FP32, "--enable-torch-compile", "true")
    vae, latents = load(args), noise(1, 16, 1, 5, 4)
    graphs: list[Any] = []
    before = vae.decode(vae.vae.denormalize(latents))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    output = DecodingStage(vae)(request(latents), args).output
    graphs.append(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
    assert max_error(output, before / 2 + 0.5) <= 2e-5
    assert graphs == [0], "nothing of it was traced"


def test_vae_tiling(serve: Serve) -> None:
    """--vae-tiling: SGLang calls enable_tiling before each decode; the tile flags hold, which SGLang's class drops."""
    tiles = [f"--vae-config.tile-sample-{what}-{side}" for what in ("min", "stride") for side in ("height", "width")]
    sizes = ("64", "64", "48", "48")
    args = serve(*FP32, "--vae-tiling", "true", *(part for pair in zip(tiles, sizes, strict=True) for part in pair))
    vae, latents = load(args), noise(1, 16, 1, 14, 11)
    whole = vae.decode(vae.vae.denormalize(latents))
    assert not vae.use_tiling
    tiled = DecodingStage(vae)(request(latents), args).output
    assert vae.use_tiling
    expected = vae.vae.tiled_decode(vae.vae.denormalize(latents))
    assert max_error(tiled, expected / 2 + 0.5) <= 2e-5
    assert max_error(tiled, whole / 2 + 0.5) > 1e-3
    config = vae.vae.config
    vae.enable_tiling()
    assert vae.vae.config is config, "plans are kept from one request to the next"
    vae.enable_tiling(tile_sample_min_height=96)
    assert vae.vae.config.tile_sample_min_height == 96


def test_image_encoding_stage(serve: Serve) -> None:
    """Image editing: SGLang's stage encodes the condition image, takes the mode and normalises it."""
    args = serve(*FP32)
    vae, truth = load(args), theirs(args.pipeline_config.vae_config)
    truth.load_state_dict(vae.state_dict())
    latents = []
    for each in (vae, truth):
        req = request(noise(1, 16, 1, 6, 8), generator=torch.Generator(), condition_image=pictures(1, 3, 48, 64))
        req.num_frames = 1
        latents.append(ImageVAEEncodingStage(each)(req, args).image_latent)
    assert max_error(*latents) <= 2e-5


def test_condition_images_are_cached_as_sglangs() -> None:
    vae, cache, pixels = ours(), ConditioningCache(2**20), pictures(1, 3, 1, 32, 40)
    with torch.no_grad(), cache.scope():
        first, second = vae.encode(pixels), vae.encode(pixels)
    assert (cache.misses, cache.hits) == (1, 1)
    assert torch.equal(first.mean, second.mean)


def test_wan_hands_out_frames(serve: Serve, tmp_path: Path) -> None:
    """SGLang's stage gives ``on_frames`` to VAEs of its own base class; to ``isinstance`` ours is one."""
    model = publish(tmp_path / "Wan2.1-T2V-1.3B-Diffusers", "AutoencoderKLWan")
    args = serve(*FP32, "--vae-decode-precision", "fp32", model=model)
    vae = load(args)
    frames: list[torch.Tensor] = []
    whole = DecodingStage(vae).decode(noise(1, 16, 3, 4, 5), args, vae_dtype=torch.float32, on_frames=frames.append)
    assert [piece.shape[2] for piece in frames] == [1, 4, 4]
    assert torch.equal(torch.cat(frames, dim=2), whole)
    assert vae.to(torch.bfloat16).decode(noise(1, 16, 1, 4, 4)).dtype == torch.float32
    with pytest.raises(NotImplementedError, match="PARAVAE_SGLANG=0"):
        vae.causal_decode(noise(1, 16, 1, 4, 4))


def test_bad_latents_get_one_clear_error(serve: Serve) -> None:
    args = serve(*FP32)
    stage = DecodingStage(load(args))
    with pytest.raises(ValueError, match="NaN"):
        stage(request(noise(1, 16, 1, 4, 4).fill_(float("nan"))), args)


def test_who_decodes_under_cfg_parallel(serve: Serve) -> None:
    """Without parallel decode one rank decodes for all; with it (see test_decode_group) all ranks do."""
    args = serve("--num-gpus", "2", "--enable-cfg-parallel", "--vae-config.use-parallel-decode", "false")
    assert DecodingStage(load(args)).parallelism_type == StageParallelismType.MAIN_RANK_ONLY


def test_decoder_role(serve: Serve) -> None:
    """--disagg-role decoder: such a server has the VAE and the decoding stage; a request arrives as latents, goes
    through ``execute_forward`` and leaves as frames on a socket. Only RDMA, which brings the latents, is missing."""
    args = serve(*FP32)
    vae = load(args)
    stage = DecodingStage(vae)
    names = ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    assert filter_modules_for_role(names, RoleType.DECODER) == ["scheduler", "vae"]
    assert RoleType.DECODER.includes_stage(stage.role_affinity)
    context = zmq.Context()
    with context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
        push.bind("inproc://results")
        pull.connect("inproc://results")
        worker = SimpleNamespace(execute_forward=lambda requests: stage(requests[0], args))
        scheduler = SimpleNamespace(
            worker=worker,
            _pool_result_push=push,
            _disagg_metrics=None,
            _disagg_trace_dispatch=lambda req: contextlib.nullcontext(),
        )
        latents = noise(1, 16, 1, 6, 5)
        SchedulerDisaggMixin._disagg_decoder_compute(scheduler, request(latents), "request 7")
        assert pull.poll(5000)
        tensors, scalars = unpack_tensors(pull.recv_multipart())
    context.term()
    assert scalars["request_id"] == "request 7"
    assert max_error(tensors["output"], vae.decode(vae.vae.denormalize(latents)) / 2 + 0.5) <= 2e-5
