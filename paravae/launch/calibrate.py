"""``paravae bench calibrate``: the constants of this machine, by which auto chooses and ``paravae plan`` predicts."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from paravae import QwenImageVAEConfig
from paravae.configs.cli import number
from paravae.files import check_writable, whole_file
from paravae.launch.bench_cases import make_cases, pixel_size
from paravae.launch.bench_model import Model, load
from paravae.launch.calibrate_fit import NO_RATES, DecodeSample, GatherSample, SharedSample, fit_link, fit_rates
from paravae.launch.calibrate_measure import Measured, Meter, Size, Sizes
from paravae.launch.errors import agreed
from paravae.launch.machine import describe
from paravae.launch.models import add_device_flag
from paravae.launch.world import Place, World, world
from paravae.vae.cost import Machine, machine_named
from paravae.vae.memory import device_name

logger = logging.getLogger("paravae")

NOTES = {
    "times": "ms: the median of single calls, by CUDA events on a GPU (the clock on a CPU), the device idle before "
    "each; on several ranks the slowest's. window: of a picture cut so, the one with most to do, decoded by itself. "
    "gather: one of ten queued in a row, size of each rank's shard. shared: the decode of all ranks.",
    "error": "predicted_ms over ms, less one. Of a shared decode what the slowest rank computes was measured, not "
    "predicted, unless the head is shared: its error is that of the exchange.",
}
_HEADINGS = ("engine", "what", "size", "how", "ms", "predicted", "error")
_GRIDS = ((2, 1), (1, 2), (2, 2), (4, 2))  # rows and columns of windows, of which one is timed

_FAST = Sizes(
    images=[(1024, 1024), (2048, 2048), (512, 512), (256, 256), (1328, 1328), (1920, 1088)],
    windows=[  # the more telling first: there may not be time for all
        ((2048, 2048), (4, 2)),
        ((1024, 1024), (2, 1)),
        ((2048, 2048), (2, 1)),
        ((1024, 1024), (4, 2)),
        ((2048, 2048), (8, 1)),
        ((1024, 1024), (1, 2)),
        ((1328, 1328), (2, 2)),
        ((1024, 1024), (4, 1)),
        ((2048, 2048), (1, 2)),
        ((1328, 1328), (8, 1)),
    ],
    videos=[((256, 256), 21), ((832, 480), 9), ((512, 512), 9)],
    tiled=[(512, 512), (1024, 1024)],
    shared=[(512, 512), (1328, 1328)],
    share=0.5,
)
_PLAIN16 = Sizes(
    images=[(1024, 1024), (512, 512), (256, 256), (1328, 1328)],
    windows=[((1024, 1024), (2, 1)), ((1024, 1024), (1, 2))],
    videos=[((256, 256), 9), ((512, 512), 5)],
    tiled=[(512, 512)],
    share=0.75,
)
_PLAIN32 = Sizes(
    images=[(1024, 1024), (512, 512), (256, 256), (768, 768)],
    windows=[((1024, 1024), (2, 1)), ((1024, 1024), (1, 2))],
    videos=[((256, 256), 5)],
    tiled=[(512, 512)],
    share=0.85,
)
_CPU_SIZES = ((64, 64), (96, 64), (128, 128), (192, 192))


AnyMeasured = Measured[DecodeSample] | Measured[GatherSample] | Measured[SharedSample]


@dataclass(frozen=True)
class _Engine:
    """``engine``: the config's name for it."""

    engine: str
    dtype: torch.dtype
    sizes: Sizes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paravae bench calibrate``."""
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="the file to write, which --vae-config.cost-table takes",
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="checkpoint in diffusers' layout (default: the full-size architecture with random weights)",
    )
    parser.add_argument("--subfolder", help="folder of the checkpoint within --model, such as vae")
    parser.add_argument(
        "--sizes",
        type=pixel_size,
        nargs="+",
        metavar="WxH",
        help="pictures to time, width x height in pixels, with windows of the largest and short videos of the smallest "
        "(default: a choice for this device, up to 2048x2048)",
    )
    parser.add_argument(
        "--seconds",
        type=number,
        default=45.0,
        metavar="X",
        help="after about as long no more pictures are timed (default: %(default)s)",
    )
    add_device_flag(parser)


def run(args: argparse.Namespace, place: Place) -> None:
    """Measure on every rank; rank 0 fits and writes."""
    with world(place, args.device) as here:
        with agreed(here.group, "check the flags"):
            _check_output(args.output, here)
        with agreed(here.group, "load the model"):
            model = load(args.model, args.subfolder, QwenImageVAEConfig(load_encoder=False))
            make_cases(["decode"], args.sizes or (), [1], model.config.arch_config)
            known = machine_named(device_name(here.device))
        known = Machine.from_json(here.group.first("constants", known.to_json()))
        meter = Meter(known, here, args.seconds)
        machine, measured = calibrate(model, meter, _engines(here.device, args.sizes))
        with here.group.agreement("write the constants"):
            if here.rank == 0:
                rows = [row_of(one, machine) for one in measured]
                write(args.output, machine, rows, here.size)
                show(machine, rows, args.output)


def calibrate(model: Model, meter: Meter, engines: Sequence[_Engine]) -> tuple[Machine, list[AnyMeasured]]:
    """The machine's constants, the same on every rank, and what they were fitted to."""
    here, found, link = meter.here, dict(meter.machine.engines), meter.machine.link
    measured: list[AnyMeasured] = []
    kinds = []
    for index, one in enumerate(engines):
        vae = model.build(replace(model.config, engine=one.engine), one.dtype, here.device)
        kinds.append(vae.engine.kind(one.dtype, here.device))
        parts = meter.images(vae, one.sizes), meter.videos(vae, one.sizes), meter.tiled(vae, one.sizes)
        found[kinds[-1]] = fit_rates(found[kinds[-1]], *([each.sample for each in part] for part in parts))
        measured += [each for part in parts for each in part]
        if index == 0 and here.size > 1:
            gathers, shared = meter.gathers(), meter.shared(vae, one.sizes.shared, found[kinds[-1]])
            link = fit_link(link, [each.sample for each in gathers], [each.sample for each in shared])
            measured += [*gathers, *shared]
        logger.info("%s: timed, %.0f s", kinds[-1], meter.elapsed_s)
        del vae
        gc.collect()
        if here.device.type == "cuda":
            torch.cuda.empty_cache()
    return Machine(device_name(here.device), _source(meter, kinds), found, link), measured


def row_of(one: AnyMeasured, machine: Machine) -> dict[str, Any]:
    """A measurement beside what the constants say of it."""
    rates = machine.engines.get(one.row["engine"], NO_RATES)
    predicted = one.sample.predict(rates, machine.link)
    error = predicted / one.sample.ms - 1
    return {**one.row, "ms": round(one.sample.ms, 4), "predicted_ms": round(predicted, 4), "error": round(error, 4)}


def write(path: Path, machine: Machine, rows: Sequence[Mapping[str, Any]], ranks: int) -> None:
    """``Machine.from_json`` reads this, and passes over what it does not know."""
    report = {**asdict(machine), "machine": describe(ranks), "rows": list(rows), "notes": NOTES}
    with whole_file(path) as part:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(machine: Machine, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Print what was measured beside what is predicted, and the constants."""
    table = Table(title=f"{machine.name}: {machine.source}")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in ("engine", "what", "how") else "right", no_wrap=True)
    for row in rows:
        length = f", {row['frames']} frames" if row["frames"] > 1 else ""
        times = f"{row['ms']:.3f}", f"{row['predicted_ms']:.3f}", f"{row['error']:+.1%}"
        table.add_row(row["engine"], row["what"], row["size"] + length, row["how"], *times)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    for kind in dict.fromkeys(row["engine"] for row in rows):
        errors = [abs(row["error"]) for row in rows if row["engine"] == kind]
        what = asdict(machine.engines[kind]) if kind in machine.engines else asdict(machine.link)
        console.print(f"{kind}: error {statistics.median(errors):.1%} in the middle, {max(errors):.1%} at most")
        console.print("  " + ", ".join(f"{name} {_figures(value)}" for name, value in what.items()), highlight=False)
    console.print(f"{path}: for --vae-config.cost-table {path}", highlight=False, soft_wrap=True)


def _figures(value: float | tuple[float, ...]) -> str:
    return " ".join(f"{one:.4g}" for one in (value if isinstance(value, tuple) else (value,)))


def _source(meter: Meter, kinds: Sequence[str]) -> str:
    """Where the constants come from, in words."""
    ranks = meter.here.size
    parts = [f"paravae bench calibrate, {datetime.date.today().isoformat()}, torch {torch.__version__}"]
    if kept := [kind for kind in meter.machine.engines if kind not in kinds]:
        parts.append(f"{' and '.join(kept)} as known of {meter.machine.name} ({meter.machine.source})")
    if ranks > 1:
        parts.append(f"link of {ranks} ranks")
    else:
        parts.append(f"link not measured on one rank: as known of {meter.machine.name} ({meter.machine.source})")
    return "; ".join(parts)


def _engines(device: torch.device, sizes: Sequence[Size] | None) -> list[_Engine]:
    """What is timed of which engine."""
    fast, plain16, plain32 = ("auto", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float32)
    if sizes is not None or device.type != "cuda":
        chosen = _sizes_of(sizes or _CPU_SIZES)
        ways = [fast, plain16, plain32] if device.type == "cuda" else [plain32, plain16]
        return [_Engine(*way, chosen) for way in ways]
    return [_Engine(*fast, _FAST), _Engine(*plain16, _PLAIN16), _Engine(*plain32, _PLAIN32)]


def _sizes_of(sizes: Sequence[Size]) -> Sizes:
    """Of pictures that were asked for: windows and tiles of the largest, a video of the smallest."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    least, most = ordered[0], ordered[-1]
    return Sizes(
        images=ordered,
        windows=[(most, grid) for grid in _GRIDS],
        videos=[(least, 5), (least, 9)],
        tiled=[most],
        shared=[most],
    )


def _check_output(path: Path, here: World) -> None:
    if path.suffix != ".json":
        raise ValueError(f"--output {path}: constants are written as JSON; give a name that ends in .json")
    if here.rank == 0:
        check_writable(path)
