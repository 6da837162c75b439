"""``paravae plan``: which ranks would decode what of a picture and how long it would take, predicted without a GPU."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
from paravae.configs.cli import add_vae_flags, number, set_flag_defaults, vae_config_from, whole_number
from paravae.files import check_writable, whole_file
from paravae.launch.bench_cases import make_cases, pixel_size
from paravae.launch.errors import agreed
from paravae.launch.models import DTYPES
from paravae.launch.plan_report import Prediction, as_json, show
from paravae.launch.planned import planner_of
from paravae.launch.world import Place
from paravae.vae.comm import RankGroup
from paravae.vae.cost import machine_of
from paravae.vae.memory import GIB, device_name, free_bytes
from paravae.vae.models.checkpoint import read_arch

ASSUMED_GPU = "NVIDIA H200"
CPU = "cpu"
_ANY_MEMORY = 2**62


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paravae plan``."""
    parser.add_argument(
        "--size", type=pixel_size, required=True, metavar="WxH", help="width x height of the picture in pixels"
    )
    parser.add_argument("--ranks", type=whole_number, required=True, metavar="N", help="GPUs that share the decode")
    parser.add_argument(
        "--frames", type=whole_number, default=1, metavar="N", help="pixel frames, 4 k + 1 (default: 1, an image)"
    )
    parser.add_argument("--batch", type=whole_number, default=1, metavar="N", help="pictures at once (default: 1)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of weights and pixels (default: bfloat16)"
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"the GPU, by the name that CUDA gives it, or {CPU} (default: the one here, without one {ASSUMED_GPU})",
    )
    parser.add_argument(
        "--memory-gib",
        type=number,
        metavar="X",
        help="memory that a rank has to spare, in GiB (default: what is free here, of a GPU elsewhere any)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a checkpoint's folder, of which only config.json is read (default: the published architecture)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write all of it there too")
    add_vae_flags(parser, QwenImageVAEConfig)
    set_flag_defaults(parser, use_parallel_decode=True)


def run(args: argparse.Namespace, place: Place) -> None:
    """Predict and print; started with several ranks, the first one does."""
    with agreed(RankGroup.alone(), "plan"):  # each rank by itself: all come to the same
        _check(args)
        prediction = predict(args)
    if place.rank > 0:
        return
    show(prediction)
    if args.json:
        with whole_file(args.json) as part:
            part.write_text(json.dumps(as_json(prediction), indent=1) + "\n", encoding="utf-8")


def predict(args: argparse.Namespace) -> Prediction:
    """What the flags ask for.

    Raises:
        ValueError: there is no such picture, or nothing fits.
    """
    config = vae_config_from(args, QwenImageVAEConfig)
    if not config.load_decoder:
        raise ValueError("--vae-config.load-decoder is false, but paravae plan is of the decoder")
    if args.model:
        config = replace(config, arch_config=read_arch(args.model, type(config.arch_config)))
    (case,) = make_cases(["decode"], [args.size], [args.frames], config.arch_config, flag="--size")
    gpu, why = _gpu(args.gpu)
    device = torch.device(CPU if gpu == CPU else "cuda")
    machine = machine_of(config.cost_table, gpu)
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(config)
    shape = (args.batch, *case.latents_shape(config.arch_config)[1:])
    dtype, ranks = DTYPES[args.dtype], args.ranks if config.use_parallel_decode else 1
    many, one = (planner_of(vae, machine, shape, dtype, device, count) for count in (ranks, 1))
    budget, whose = _budget(args.memory_gib, config.memory_limit_gib, device, here=gpu == _gpu_here())
    return Prediction(
        case=case,
        batch=args.batch,
        dtype=args.dtype,
        gpu=f"{gpu} ({why})",
        machine=machine,
        memory=whose,
        budget_bytes=budget,
        planner=many,
        chosen=many.plan(None, budget),
        one_rank_ms=one.single().choice.ms,
    )


def _check(args: argparse.Namespace) -> None:
    for name in ("ranks", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, needs at least 1")
    if args.memory_gib is not None and not 0 < args.memory_gib < float("inf"):
        raise ValueError(f"--memory-gib is {args.memory_gib:g}, needs a positive number of GiB")
    if args.gpu is not None and not args.gpu.strip():
        raise ValueError(f"--gpu is empty, needs a GPU's name such as {ASSUMED_GPU!r}")
    if args.json:
        if args.json.suffix != ".json":
            raise ValueError(f"--json {args.json}: give a name that ends in .json")
        check_writable(args.json)


def _gpu_here() -> str | None:
    return device_name(torch.device("cuda")) if torch.cuda.is_available() else None


def _gpu(asked: str | None) -> tuple[str, str]:
    """Its name, and why this one."""
    if asked is not None:
        return asked, "as --gpu says"
    here = _gpu_here()
    return (here, "the GPU here") if here else (ASSUMED_GPU, "no GPU is found here: assumed, --gpu names another")


def _budget(asked: float | None, limit: float | None, device: torch.device, *, here: bool) -> tuple[int, str]:
    """Bytes that a decode may need on a rank, and who says so."""
    if asked is not None and limit is not None:
        raise ValueError(
            "--memory-gib and --vae-config.memory-limit-gib are both given; a decode goes by the latter alone"
        )
    if limit is not None:
        return int(limit * GIB), f"{limit:g} GiB, by --vae-config.memory-limit-gib"
    if asked is not None:
        return int(asked * GIB), f"{asked:g} GiB, by --memory-gib"
    if here or device.type == CPU:
        free = free_bytes(device)
        return free, f"{free / GIB:.1f} GiB, as is free here"
    return _ANY_MEMORY, "taken to suffice; --memory-gib says how much there is"
