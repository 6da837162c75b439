"""The flags of ``paravae engine build``, and what of them goes together."""

from __future__ import annotations

import argparse
from pathlib import Path

from paravae.configs.cli import number, whole_number
from paravae.configs.values import width_and_height
from paravae.files import check_writable
from paravae.launch.models import add_checkpoint_flags
from paravae.launch.plan import ASSUMED_GPU
from paravae.vae.engines.base import Half
from paravae.vae.engines.trt.build import LEVELS
from paravae.vae.engines.trt.flavour import FLAVOURS
from paravae.vae.engines.trt.parts import DTYPES, OUTPUTS
from paravae.vae.engines.trt.shapes import RATIOS, size_text

HALVES: tuple[Half, ...] = ("encoder", "decoder")
KINDS = ("static", "multi-profile")
MODES = ("auto", "patch")
# What TensorRT-RTX builds for by itself. NVIDIA advises to build for Turing (7.5) alone: beside others it slows all.
ANY_GPU = ("8.0", "8.6", "8.9", "12.0")
TURING = "7.5"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paravae engine build``."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the engines")
    add_checkpoint_flags(parser)
    _add_flags_of_shapes(parser)
    _add_flags_of_graphs(parser)
    _add_flags_of_tensorrt(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say which engines would be built, and how large")


def _add_flags_of_shapes(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--kind",
        choices=KINDS,
        help="static: an engine for each of --sizes (the default); multi-profile: one for all from 64 to 1920 pixels",
    )
    what.add_argument(
        "--for-parallel", type=whole_number, metavar="N", help="engines for N ranks that share pictures of --sizes"
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        metavar="WxH,...",
        help=f"in pixels (default: {','.join(map(size_text, RATIOS.values()))})",
    )
    parser.add_argument("--parts", type=_halves, default=HALVES, metavar="encoder,decoder", help="default: both")
    parser.add_argument(
        "--parallel-decode-mode",
        choices=MODES,
        default="auto",
        help="with --for-parallel: the mode of decoding, auto leaving to one rank what it does as fast (default: auto)",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="with --for-parallel: of the ranks, by the name that CUDA gives it, from which auto predicts times "
        f"(default: the one here, without one {ASSUMED_GPU})",
    )
    parser.add_argument("--cost-table", metavar="FILE", help="with --for-parallel: of paravae bench calibrate")


def _add_flags_of_graphs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="what engines compute, take and give (default: float16)"
    )
    parser.add_argument(
        "--denormalize", action="store_true", help="decoders take normalised latents; for other programs"
    )
    parser.add_argument(
        "--pixels",
        choices=OUTPUTS,
        default="float",
        help="decoders give float, [B, 3, H, W] in [-1, 1], or, for others, uint8, [B, H, W, 3] (default: float)",
    )


def _add_flags_of_tensorrt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--flavour",
        choices=("auto", *FLAVOURS),
        default="auto",
        help="tensorrt, for data-centre GPUs; tensorrt_rtx, for RTX GPUs; auto: the one that is installed",
    )
    parser.add_argument(
        "--compute-capabilities",
        type=_texts,
        metavar="X.Y,...",
        help="of the GPUs to build for, with TensorRT-RTX (default: of the GPU here, without one "
        f"{','.join(ANY_GPU)}; name {TURING} alone, beside others it slows all)",
    )
    parser.add_argument(
        "--workspace-gib", type=number, metavar="X", help="most memory to work in that an engine may need, in GiB"
    )
    parser.add_argument(
        "--optimization-level", type=whole_number, metavar="0..5", help="0: built fastest, 5: runs fastest"
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="made or brought up to date, to build faster next time; of no use to TensorRT-RTX, which times nothing",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError, or an OSError, for flags that cannot be followed."""
    if args.for_parallel is not None and args.for_parallel < 2:
        raise ValueError(f"--for-parallel is {args.for_parallel}, needs at least 2 ranks; --kind static is for one")
    if args.kind == "multi-profile" and args.sizes is not None:
        raise ValueError("--sizes means nothing to --kind multi-profile, whose engines take any size")
    if args.for_parallel is None:
        for name in ("gpu", "cost_table"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} means nothing without --for-parallel")
    if args.workspace_gib is not None and not 0 < args.workspace_gib < float("inf"):
        raise ValueError(f"--workspace-gib is {args.workspace_gib:g}, needs a positive number of GiB")
    if args.optimization_level is not None and args.optimization_level not in LEVELS:
        raise ValueError(f"--optimization-level is {args.optimization_level}, needs 0 to 5")
    if args.timing_cache is not None:
        check_writable(args.timing_cache)
    if not args.dry_run:
        _check_output(args.output)


def _check_output(folder: Path) -> None:
    """Raise an OSError unless files can be made in ``folder``, which need not be there yet."""
    place = folder.absolute() / "engine.trt"
    while not place.parent.exists():
        place = place.parent
    if not place.parent.is_dir():
        raise NotADirectoryError(f"--output {folder}: {place.parent} is a file, needs to be a folder")
    check_writable(place)


def _texts(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _sizes(text: str) -> list[tuple[int, int]]:
    """argparse's type: "64x48,32x32" -> (width, height) of each."""
    try:
        return [width_and_height(size) for size in _texts(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _halves(text: str) -> tuple[Half, ...]:
    asked = _texts(text)
    if not set(asked) <= set(HALVES):
        raise argparse.ArgumentTypeError(f"got {text!r}, needs one or both of {', '.join(HALVES)}")
    return tuple(half for half in HALVES if half in asked)
