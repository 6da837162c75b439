"""``paravae engine verify``: run every engine of a folder on this GPU, beside PyTorch: loads, computes, times."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from paravae import AutoencoderKLQwenImage
from paravae.files import check_writable, whole_file
from paravae.launch.bench_timing import call_ms, spread
from paravae.launch.errors import agreed
from paravae.launch.machine import describe
from paravae.launch.models import add_checkpoint_flags
from paravae.launch.world import Place
from paravae.vae.comm import RankGroup
from paravae.vae.engines.base import Half
from paravae.vae.engines.trt.directory import Entry, read_directory
from paravae.vae.engines.trt.flavour import FLAVOURS, NoTensorRTError, find_flavour
from paravae.vae.engines.trt.manifest import Manifest, ManifestError, all_weights_sha256, read_engine
from paravae.vae.engines.trt.parts import DTYPES, PORTS, ExportOptions, Part, input_channels, part_module
from paravae.vae.engines.trt.runner import EngineError, Library, Runner
from paravae.vae.engines.trt.shapes import Size, size_text
from paravae.vae.pixels import psnr_db

logger = logging.getLogger("paravae")

_REPEATS, _WARM_UP = 10, 3
_TIMES_PYTORCHS = 1.5
_FLOAT32_ERROR = 1e-4
BOUND = (
    f"{_TIMES_PYTORCHS} x the error of PyTorch in the engine's dtype, and {_FLOAT32_ERROR:g} of the largest value; "
    "both against PyTorch in float32, TF32 off"
)


@dataclass(frozen=True)
class Verified:
    """One engine at the best size of one of its profiles. ``trouble``: why there are no figures, or what is wrong with
    them; errors are largest ones, in the output's own unit, ``psnr_db`` over its range."""

    file: str
    part: str
    size: str
    max_error: float | None = None
    torch_error: float | None = None
    allowed: float | None = None
    psnr_db: float | None = None
    ms: float | None = None
    torch_ms: float | None = None
    trouble: str | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paravae engine verify``."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the engines")
    add_checkpoint_flags(parser)
    parser.add_argument("--flavour", choices=("auto", *FLAVOURS), default="auto", help="auto: the one that built them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file of the figures")


def run(args: argparse.Namespace, place: Place) -> None:
    """Print a table and write JSON; started with several ranks, the first one does.

    Raises:
        EngineError: an engine cannot be loaded or run, or its error is over the bound.
    """
    if place.rank > 0:
        return
    with agreed(RankGroup.alone(), "read the folder"):
        entries = read_directory(args.folder)
        if args.output is not None:
            check_writable(args.output)
        if not torch.cuda.is_available():
            raise ValueError("paravae engine verify runs engines, which takes a CUDA GPU; there is none here")
        vae = AutoencoderKLQwenImage.from_pretrained(args.model, args.subfolder)
    device = torch.device("cuda", torch.cuda.current_device())
    found = list(verify_all(args.folder, entries, vae, _library_of(args.flavour), device))
    _show(found)
    if args.output is not None:
        report = {"what": "engines beside PyTorch", "machine": describe(1), "bound": BOUND}
        with whole_file(args.output) as part:
            part.write_text(json.dumps(report | {"rows": list(map(asdict, found))}, indent=2) + "\n", encoding="utf-8")
    if bad := [row for row in found if row.trouble]:
        raise EngineError(f"{len(bad)} of {len(found)}: {bad[0].file}: {bad[0].trouble}")
    print(f"{args.folder}: {len(found)} engines and sizes, all within the bound ({BOUND})", flush=True)


def verify_all(
    root: Path,
    entries: tuple[Entry, ...],
    vae: AutoencoderKLQwenImage,
    library: Callable[[Manifest], Library],
    device: torch.device,
) -> Iterator[Verified]:
    """``vae``: on the CPU, in float32."""
    weights = {half: all_weights_sha256(vae.state_dict(), half) for half in get_args(Half)}
    for entry in entries:
        file = str(entry.path.relative_to(root))
        if entry.manifest is None:
            trouble = entry.trouble or "it has no manifest, by which to know what it computes"
            yield Verified(file, entry.part or "?", "", trouble=trouble)
            continue
        try:
            manifest, blob = read_engine(entry.path)
            if manifest.weights_sha256 != weights[manifest.half]:
                raise EngineError("it was built from other weights than the model's")
            runner = Runner(library(manifest), blob, device)
        except (EngineError, ManifestError, NoTensorRTError) as error:
            yield Verified(file, entry.manifest.part, "", trouble=str(error))
            continue
        for size in dict.fromkeys(profile.opt for profile in runner.profiles):
            yield _verified(file, manifest, runner, vae, size, device)


def _verified(
    file: str, manifest: Manifest, runner: Runner, vae: AutoencoderKLQwenImage, size: Size, device: torch.device
) -> Verified:
    part, dtype = manifest.part, DTYPES[manifest.dtype]
    options = ExportOptions(manifest.dtype, manifest.denormalize, manifest.output)
    like_it = part_module(vae, part, options).to(device)
    truth_of = part_module(vae, part, ExportOptions("float32", manifest.denormalize)).to(device)
    x = _example(part, (manifest.batch, input_channels(vae, part), *size)).to(device, dtype)
    where = size_text(size)
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            truth, by_torch, y = truth_of(x.float()), _floats(like_it(x)), _floats(runner(x))
            times = spread(_times(lambda: runner(x), device))["ms"], spread(_times(lambda: like_it(x), device))["ms"]
    except (EngineError, torch.OutOfMemoryError) as failure:
        return Verified(file, part, where, trouble=str(failure).splitlines()[0])
    error, of_torch = _largest(y, truth), _largest(by_torch, truth)
    allowed = _TIMES_PYTORCHS * of_torch + _FLOAT32_ERROR * max(1.0, float(truth.abs().max()))
    value_range = 2.0 if PORTS[part][1] == "pixels" else float(truth.max() - truth.min())
    trouble = None if error <= allowed else f"its error is {error:.3g} at {where}, allowed are {allowed:.3g}"
    return Verified(
        file, part, where, error, of_torch, allowed, psnr_db(y, truth, value_range), *times, trouble=trouble
    )


def _times(call: Callable[[], object], device: torch.device) -> list[float]:
    for _ in range(_WARM_UP):
        call()
    return [call_ms(call, device) for _ in range(_REPEATS)]


def _example(part: Part, shape: tuple[int, ...]) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.clamp(-1, 1) if PORTS[part][0] == "pixels" else values


def _floats(y: Tensor) -> Tensor:
    """[B, C, H, W] in float32, of levels too."""
    return y.movedim(-1, 1).float() / 127.5 - 1 if y.dtype == torch.uint8 else y.float()


def _largest(y: Tensor, truth: Tensor) -> float:
    """NaN counts as the largest of errors."""
    difference = float((y.double() - truth.double()).abs().max())
    return difference if difference == difference else float("inf")


def _library_of(flavour: str) -> Callable[[Manifest], Library]:
    return lambda manifest: find_flavour(manifest.flavour if flavour == "auto" else flavour)


def _show(found: list[Verified]) -> None:
    table = Table()
    for name in ("file", "part", "size", "max error", "PyTorch's", "allowed", "PSNR, dB", "ms", "PyTorch, ms", ""):
        table.add_column(name)
    for row in found:
        figures = [row.max_error, row.torch_error, row.allowed, row.psnr_db, row.ms, row.torch_ms]
        texts = ["" if figure is None else f"{figure:.4g}" for figure in figures]
        table.add_row(row.file, row.part, row.size, *texts, row.trouble or "fine")
    console = Console(highlight=False)
    (console if console.is_terminal else Console(width=180, highlight=False)).print(table)
