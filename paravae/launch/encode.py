"""``paravae encode``: a picture, a folder of frames or a video -> latents in a file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from paravae import AutoencoderKLQwenImage, Posterior, QwenImageVAEConfig
from paravae.configs.cli import boolean, set_flag_defaults, vae_config_from, whole_number
from paravae.files import check_writable
from paravae.launch.decode import warn_if_alone
from paravae.launch.errors import agreed
from paravae.launch.latents import SUFFIX, write_latents
from paravae.launch.models import add_model_flags, load_model
from paravae.launch.picture_input import fit_to_model, read_picture
from paravae.launch.progress import progress_bar
from paravae.launch.world import Place, world
from paravae.vae.pixels import from_uint8


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paravae encode``."""
    parser.add_argument(
        "--input", type=Path, required=True, metavar="FILE", help="an image, a folder of frames or .mp4"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=f"{SUFFIX} file to write")
    parser.add_argument("--crop", action="store_true", help="cut the sides, centrally, to multiples of 8 pixels")
    parser.add_argument("--frames", type=whole_number, metavar="N", help="take only the first N frames; N = 4 k + 1")
    parser.add_argument("--sample", action="store_true", help="draw the latents at random; default: their mean")
    parser.add_argument("--seed", type=whole_number, metavar="N", help="seed of --sample (default: 0)")
    parser.add_argument(
        "--normalized",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        metavar="true|false",
        help="write the latents as diffusion models use them, (z - mean) / std (default: false)",
    )
    add_model_flags(parser)
    set_flag_defaults(parser, load_decoder=False)


def run(args: argparse.Namespace, place: Place) -> None:
    """Encode on every rank; rank 0 writes."""
    if args.seed is not None and not args.sample:
        raise ValueError("--seed means nothing without --sample: the mean is no matter of chance")
    with world(place, args.device) as here:
        with agreed(here.group, "read the flags"):
            config = vae_config_from(args, QwenImageVAEConfig)
            if not config.load_encoder:
                raise ValueError("--vae-config.load-encoder is false, but paravae encode needs the encoder")
        warn_if_alone(here, config.use_parallel_decode)
        with agreed(here.group, "open the picture and the output"):
            if here.rank == 0:
                _check_output(args.output)
            levels = read_picture(args.input, args.frames)
        with agreed(here.group, "load the model"):
            vae = load_model(args, config, here.device)
            arch = vae.config.arch_config
            levels = fit_to_model(levels, arch.spatial_ratio, arch.temporal_ratio, args.crop, str(args.input))
        frames, height, width = levels.shape[2:]
        start = time.perf_counter()
        with progress_bar("encoding", here.rank == 0) as on_progress:
            posterior = vae.encode(from_uint8(levels, vae.dtype).to(here.device), on_progress=on_progress)
        latents = _latents(vae, posterior, args).cpu()
        seconds = time.perf_counter() - start
        with here.group.agreement("write the latents"):
            if here.rank == 0:
                write_latents(
                    args.output, latents, normalized=args.normalized, frames=frames, height=height, width=width
                )
        if here.rank == 0:
            kind = "normalised" if args.normalized else "not normalised"
            print(
                f"{args.output}: latents {list(latents.shape)}, {kind}, of {width} x {height}; "
                f"encoded in {seconds:.2f} s",
                flush=True,
            )


def _latents(vae: AutoencoderKLQwenImage, posterior: Posterior, args: argparse.Namespace) -> torch.Tensor:
    if args.sample:
        generator = torch.Generator().manual_seed(args.seed or 0)  # on the host: one seed, one result anywhere
        latents = posterior.sample(generator)
    else:
        latents = posterior.mode()
    return vae.normalize(latents) if args.normalized else latents


def _check_output(path: Path) -> None:
    if path.suffix != SUFFIX:
        raise ValueError(f"--output {path}: latents are written as {SUFFIX}; give a name that ends so")
    check_writable(path)
