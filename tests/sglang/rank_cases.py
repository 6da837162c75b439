"""Cases for several ranks on SGLang's decode group, which SGLang's own functions set up."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sglang.multimodal_gen.runtime.distributed import (
    get_decode_parallel_group_coordinator,
    get_sp_world_size,
    maybe_init_distributed_environment_and_model_parallel,
)
from sglang.multimodal_gen.runtime.distributed.parallel_state import destroy_model_parallel
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import StageParallelismType
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
from sglang.multimodal_gen.runtime.platforms.plugins import load_plugins
from sglang.multimodal_gen.runtime.server_args import prepare_server_args, set_global_server_args

from paravae import RankError
from paravae.integrations.sglang_vae import qwen_image_vae, wan_vae
from tests.builders import digest, max_error, noise
from tests.fault_cases import BrokenEngine, error_of
from tests.ranks import Case, Rank
from tests.sglang.models import load, request, small_config, small_wan_config, their_wan, theirs

TILES = {f"tile_sample_{what}_{side}": px for what, px in (("min", 64), ("stride", 48)) for side in ("height", "width")}
MODES = ("auto", "patch", "spatial_shard", "spatial", "tiled")


def set_up(here: Rank, **degrees: int) -> Any:
    """SGLang's groups for these degrees, anew; its decode group."""
    os.environ.update(RANK=str(here.rank), LOCAL_RANK=str(here.rank), WORLD_SIZE=str(here.size))
    destroy_model_parallel()
    maybe_init_distributed_environment_and_model_parallel(**{"tp_size": 1, "sp_size": 1, **degrees})
    return get_decode_parallel_group_coordinator()


def shared_vae(**options: Any) -> Any:
    vae = qwen_image_vae(small_config(use_parallel_decode=True, **TILES, **options))
    vae.load_state_dict(theirs().state_dict())
    return vae.eval()


def decodes(vae: Any, group: Any, *, seed: int = 0) -> str:
    """An image and a video on ``group``, beside SGLang's own class on one rank, or beside our tiles on one."""
    truth, tiled = theirs(), vae.parallel_decode_mode == "tiled"
    results = []
    for shape in ((1, 16, 1, 14, 11), (1, 16, 2, 9, 12), (2, 16, 1, 5, 3)):
        latents = noise(*shape, seed=seed)
        pixels = vae.decode(latents)
        if tiled:
            assert torch.equal(pixels, vae.vae.tiled_decode(latents))
        else:
            assert max_error(pixels, truth.decode(latents)) <= 2e-5
        results.append(pixels)
    ranks = vae.vae.parallel_group
    assert ranks.data is group.device_group
    assert (ranks.rank, ranks.size) == (group.rank_in_group, group.world_size)
    return digest(*results)


def mode(here: Rank, mode: str) -> str:
    group = set_up(here, sp_size=2, ulysses_degree=2)
    return decodes(shared_vae(parallel_decode_mode=mode), group)


def off(here: Rank) -> str:
    """Each rank by itself: nothing is exchanged, so each may decode something else."""
    set_up(here, sp_size=2, ulysses_degree=2)
    vae = qwen_image_vae(small_config())
    vae.load_state_dict(theirs().state_dict())
    latents = noise(1, 16, 1, 5 + here.rank, 4)
    assert max_error(vae.decode(latents), theirs().decode(latents)) <= 2e-5
    return "fine"


def no_decode_group(here: Rank) -> str:
    """torch.distributed is up, but SGLang has no groups: the world is not ours to use."""
    destroy_model_parallel()
    vae, latents = shared_vae(), noise(1, 16, 1, 4 + here.rank, 5)
    assert max_error(vae.decode(latents), theirs().decode(latents)) <= 2e-5
    assert vae.vae.last_choice.how.startswith("single")
    return "fine"


def encodes_alone(here: Rank) -> str:
    """SGLang lets some stages encode on one rank only, so no encode may wait for the others."""
    set_up(here, sp_size=2, ulysses_degree=2)
    if here.rank == 0:
        pixels = noise(1, 3, 1, 40, 48).clamp(-1, 1)
        assert max_error(shared_vae().encode(pixels).mode(), theirs().encode(pixels).mode()) <= 2e-5
    return "fine"


def wan_streams(here: Rank) -> str:
    """Only one rank writes the file, and has ``on_frames``; all decode."""
    set_up(here, sp_size=2, ulysses_degree=2)
    vae = wan_vae(small_wan_config(use_parallel_decode=True))
    vae.load_state_dict(their_wan().state_dict())
    latents, frames = noise(1, 16, 3, 9, 7), []
    pixels = vae.decode(latents, **({"on_frames": frames.append} if here.rank == 0 else {}))
    assert max_error(pixels, their_wan().decode(latents)) <= 2e-5
    assert [piece.shape[2] for piece in frames] == ([1, 4, 4] if here.rank == 0 else [])
    return digest(pixels)


def one_rank_fails(here: Rank) -> str:
    group = set_up(here, sp_size=2, ulysses_degree=2)
    vae = shared_vae(parallel_decode_mode="patch")
    sound, latents = vae.vae.engine, noise(1, 16, 1, 14, 11)
    if here.rank == 1:
        vae.vae.use_engine(BrokenEngine(sound, "decode"))
    error = error_of(lambda: vae.decode(latents))
    assert "broken on purpose" in str(error)
    assert isinstance(error, RankError) == (here.rank == 0)
    vae.vae.use_engine(sound)
    return decodes(vae, group)


def through_the_stage(here: Rank, model: Path) -> str:
    """A server's flags, its loader and its decoding stage, on all ranks of the decode group."""
    load_plugins()
    sizes = {"num-gpus": "2", "sp-degree": "2", "ulysses-degree": "2", "vae-precision": "fp32"}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    args = prepare_server_args(["--model-path", str(model), *flags, "--vae-config.parallel-decode-mode", "patch"])
    set_global_server_args(args)
    set_up(here, sp_size=2, ulysses_degree=2)
    vae = load(args)
    truth = theirs(small_config())
    truth.load_state_dict(vae.state_dict())
    latents = noise(1, 16, 1, 12, 9)
    pixels, expected = (DecodingStage(each)(request(latents), args).output for each in (vae, truth))
    assert max_error(pixels, expected) <= 2e-5
    assert "2 rank" in vae.vae.last_choice.how
    return digest(pixels)


def cfg_parallel(here: Rank, model: Path) -> str:
    """Two ranks of sequence parallelism times two of CFG: SP is half the world, and all four decode."""
    group = set_up(here, sp_size=2, ulysses_degree=2, cfg_degree=2)
    assert (get_sp_world_size(), group.world_size) == (2, 4)
    args = prepare_server_args(
        ["--model-path", str(model), "--num-gpus", "4", "--ulysses-degree", "2", "--enable-cfg-parallel"]
    )
    set_global_server_args(args)
    vae = shared_vae(parallel_decode_mode="patch")
    assert DecodingStage(vae).parallelism_type == StageParallelismType.REPLICATED
    return decodes(vae, group)


def replicas(here: Rank) -> str:
    """Two replicas of two ranks each decode different requests at the same time."""
    group = set_up(here, sp_size=2, ulysses_degree=2, dp_size=2)
    assert group.ranks == [[0, 1], [2, 3]][here.rank // 2]
    for name in ("auto", "patch", "tiled"):
        decodes(shared_vae(parallel_decode_mode=name), group, seed=here.rank // 2)
    return "fine"


def tensor_parallel_replicas(here: Rank) -> str:
    """The same VAE follows SGLang when its groups are set up anew."""
    vae = shared_vae(parallel_decode_mode="patch")
    decodes(vae, set_up(here, sp_size=4, ulysses_degree=4))
    decodes(vae, set_up(here, tp_size=2, dp_size=2), seed=here.rank // 2)
    return "fine"


def two_ranks(model: Path) -> dict[str, Case]:
    cases: dict[str, Case] = {name: partial(mode, mode=name) for name in MODES}
    cases |= {case.__name__: case for case in (off, no_decode_group, encodes_alone, wan_streams, one_rank_fails)}
    return cases | {"through_the_stage": partial(through_the_stage, model=model)}


def four_ranks(model: Path) -> dict[str, Case]:
    return {
        "cfg_parallel": partial(cfg_parallel, model=model),
        "replicas": replicas,
        "tensor_parallel_replicas": tensor_parallel_replicas,
    }
