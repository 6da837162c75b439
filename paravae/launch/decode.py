"""``paravae decode``: latents in a file -> a picture, a folder of frames or a video."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
from paravae.configs.cli import boolean, number, set_flag_defaults, vae_config_from, whole_number
from paravae.launch.errors import agreed
from paravae.launch.latents import LatentsFile, open_latents, read_latents, spatial_size
from paravae.launch.models import add_model_flags, load_model
from paravae.launch.picture_output import FORMATS, PictureOutput, plan_output, write_pictures
from paravae.launch.progress import progress_bar
from paravae.launch.world import Place, World, world

logger = logging.getLogger("paravae")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paravae decode``."""
    parser.add_argument("--latents", type=Path, required=True, metavar="FILE", help="safetensors file of latents")
    parser.add_argument("--output", required=True, metavar="FILE", help=f"what to write: {FORMATS}")
    parser.add_argument(
        "--normalized",
        type=boolean,
        nargs="?",
        const=True,
        metavar="true|false",
        help="whether the latents are as a diffusion model gives them, (z - mean) / std; default: as the file says",
    )
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}",
            type=whole_number,
            metavar="PX",
            help=f"{side} of the picture in pixels, for packed latents [B, L, 64]; default: as the file says",
        )
    parser.add_argument(
        "--max-latents-gib",
        type=number,
        default=4.0,
        metavar="X",
        help="refuse larger files (default: %(default)s GiB)",
    )
    parser.add_argument("--fps", type=number, default=16.0, help="frames a second of a video (default: %(default)s)")
    add_model_flags(parser)
    set_flag_defaults(parser, load_encoder=False)


def run(args: argparse.Namespace, place: Place) -> None:
    """Decode on every rank; rank 0 writes."""
    with world(place, args.device) as here:
        with agreed(here.group, "read the flags"):
            config = vae_config_from(args, QwenImageVAEConfig)
            if not config.load_decoder:
                raise ValueError("--vae-config.load-decoder is false, but paravae decode needs the decoder")
        warn_if_alone(here, config.use_parallel_decode)
        with agreed(here.group, "open the latents and the output"):
            file = open_latents(
                args.latents,
                normalized=args.normalized,
                height=args.height,
                width=args.width,
                max_gib=args.max_latents_gib,
            )
            frames = config.arch_config.pixel_frames(file.lat_frames)
            output = plan_output(args.output, file.batch, frames, args.fps) if here.rank == 0 else None
        with agreed(here.group, "load the model"):
            vae = load_model(args, config, here.device)
            spatial_size(file, vae.config.arch_config)
        levels, seconds = _decode(vae, file, here)
        with here.group.agreement("write the pictures"):
            if output:
                write_pictures(output, levels)
        if output:
            print(_summary(output, levels, vae, seconds), flush=True)


def warn_if_alone(here: World, use_parallel_decode: bool) -> None:
    """Say so if several ranks were started, but each is to do the same work."""
    if here.size > 1 and here.rank == 0 and not use_parallel_decode:
        logger.warning(
            "%d ranks were started, but each does the whole work alone: --vae-config.use-parallel-decode shares it",
            here.size,
        )


def _decode(vae: AutoencoderKLQwenImage, file: LatentsFile, here: World) -> tuple[Tensor, float]:
    """The picture's levels, uint8 [B, 3, F, H, W] in the host's memory, and the seconds that the decode took."""
    with agreed(here.group, "read the latents"):
        latents = read_latents(file, vae)
    start = time.perf_counter()
    with progress_bar("decoding", here.rank == 0) as on_progress:
        levels = vae.decode(latents, output_type="uint8", on_progress=on_progress)
    if here.device.type == "cuda":
        torch.cuda.synchronize(here.device)
    seconds = time.perf_counter() - start
    return levels.cpu() if here.rank == 0 else levels, seconds


def _summary(output: PictureOutput, levels: Tensor, vae: AutoencoderKLQwenImage, seconds: float) -> str:
    frames, height, width = levels.shape[2:]
    choice = vae.last_choice
    assert choice is not None
    length = f", {frames} frames" if frames > 1 else ""
    return f"{output}: {width} x {height}{length}; {choice.how}; decoded in {seconds:.2f} s"
