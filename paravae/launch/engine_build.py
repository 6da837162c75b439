"""``paravae engine build``: TensorRT engines of a VAE, for pictures of given sizes, of any size, or for ranks that
share one; needs TensorRT, and with TensorRT-RTX no GPU."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import paravae
from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
from paravae.launch.bench_cases import make_cases
from paravae.launch.engine_flags import ANY_GPU, TURING, add_flags, check_flags
from paravae.launch.engine_targets import (
    Sharing,
    multi_profile_targets,
    parallel_targets,
    static_targets,
    unit_px,
)
from paravae.launch.errors import agreed
from paravae.launch.plan import ASSUMED_GPU
from paravae.launch.progress import progress_bar
from paravae.launch.world import Place
from paravae.vae.comm import RankGroup
from paravae.vae.cost import machine_of
from paravae.vae.engines.trt.build import BuildOptions, Built, Source, build_engine, estimated_bytes
from paravae.vae.engines.trt.check import check_onnx
from paravae.vae.engines.trt.export import export_onnx
from paravae.vae.engines.trt.flavour import FLAVOURS, Flavour, Watch, find_flavour
from paravae.vae.engines.trt.manifest import all_weights_sha256, half_of
from paravae.vae.engines.trt.parts import ExportOptions, Part, part_module
from paravae.vae.engines.trt.shapes import RATIOS, Size, Target, size_text
from paravae.vae.memory import GIB, device_name
from paravae.vae.models.checkpoint import locate, read_arch

__all__ = ["add_flags", "run"]

logger = logging.getLogger("paravae")

_CHECKED_PX: tuple[Size, ...] = ((64, 64), (96, 160))  # a graph is checked at sizes that a CPU has no trouble with


def run(args: argparse.Namespace, place: Place) -> None:
    """Build, or with --dry-run say what; started with several ranks, the first one does."""
    if place.rank > 0:
        return
    with agreed(RankGroup.alone(), "plan the engines"):
        check_flags(args)
        config = _config(args)
        targets = _targets(args, config)
        if args.dry_run:
            _show(args, config, targets)
            return
        if args.denormalize or args.pixels != "float":
            logger.warning(
                "engines with --denormalize or --pixels uint8 are for other programs; paravae runs them plain"
            )
        flavour = _flavour(args.flavour)
        options = _build_options(args, flavour)
        vae = AutoencoderKLQwenImage.from_pretrained(args.model, args.subfolder, vae_config=config)
    built = list(_build_all(args, flavour, vae, targets, options))
    total_mb = sum(engine.manifest.engine_bytes for engine in built) / 1e6
    seconds = sum(engine.seconds for engine in built)
    print(
        f"{args.output}: {_count(len(built))}, {total_mb:.0f} MB, by {flavour.name} {flavour.version} for "
        f"{', '.join(options.compute_capabilities)}; built in {seconds:.1f} s",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------- planning


def _config(args: argparse.Namespace) -> QwenImageVAEConfig:
    arch = read_arch(locate(args.model, args.subfolder), type(QwenImageVAEConfig().arch_config))
    return QwenImageVAEConfig(
        arch_config=arch, load_encoder="encoder" in args.parts, load_decoder="decoder" in args.parts
    )


def _targets(args: argparse.Namespace, config: QwenImageVAEConfig) -> list[Target]:
    arch = config.arch_config
    sizes: list[Size] = list(RATIOS.values())
    if args.sizes is not None:
        cases = make_cases(["decode"], args.sizes, [1], arch, flag="--sizes")
        sizes = [(case.height, case.width) for case in cases]
    if args.kind == "multi-profile":
        return multi_profile_targets(args.parts, arch.spatial_ratio)
    if args.for_parallel is None:
        return static_targets(args.parts, sizes, arch.spatial_ratio)
    gpu = args.gpu or (device_name(torch.device("cuda")) if torch.cuda.is_available() else ASSUMED_GPU)
    logger.info("windows are planned for %d x %s; --gpu plans for others", args.for_parallel, gpu)
    sharing = Sharing(
        args.for_parallel, args.parallel_decode_mode, machine_of(args.cost_table, gpu), args.pixels == "uint8"
    )
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(config)
    return parallel_targets(vae, args.parts, sizes, args.dtype, sharing)


def _show(args: argparse.Namespace, config: QwenImageVAEConfig, targets: list[Target]) -> None:
    """Print the plan; of sizes width x height, in the units of what a part takes."""
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(config)
    vae.to_empty(device="cpu")
    export = ExportOptions(dtype=args.dtype)
    modules = {target.part: part_module(vae, target.part, export) for target in targets}
    counts = {part: sum(t.numel() for t in module.state_dict().values()) for part, module in modules.items()}
    table = Table()
    for column in ("part", "min", "opt", "max", "file", "about MB"):
        table.add_column(column, justify="left" if column in ("part", "file") else "right", no_wrap=True)
    total = 0
    for target in targets:
        size = estimated_bytes(counts[target.part], args.dtype, target)
        total += size
        for index, profile in enumerate(target.profiles):
            ends = [size_text(end) for end in (profile.min, profile.opt, profile.max)]
            told = (target.part, *ends, target.file, f"{size / 1e6:.0f}") if index == 0 else ("", *ends, "", "")
            table.add_row(*told)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(width=140, highlight=False)).print(table)
    print(f"{_count(len(targets))}, about {total / 1e6:.0f} MB, in {args.output}; nothing was built (--dry-run)")


# ------------------------------------------------------------------------------------------------- building


def _build_all(
    args: argparse.Namespace, flavour: Flavour, vae: AutoencoderKLQwenImage, targets: list[Target], how: BuildOptions
) -> Iterator[Built]:
    """Each part is exported once, its height and width free, and checked; each engine is built from that."""
    wanted = ExportOptions(dtype=args.dtype, denormalize=args.denormalize, output=args.pixels)
    hashes = {half: all_weights_sha256(vae.state_dict(), half) for half in args.parts}
    done = 0
    with tempfile.TemporaryDirectory(prefix="paravae-engine-") as folder:
        for part, group in groupby(sorted(targets, key=lambda target: target.part), lambda target: target.part):
            source = _exported(vae, part, Path(folder), wanted.for_part(part), hashes[half_of(part)])
            for target in group:
                done += 1
                yield _build_one(flavour, source, target, args.output, how, f"{done} of {len(targets)}")
            source.onnx.unlink()


def _exported(
    vae: AutoencoderKLQwenImage, part: Part, folder: Path, options: ExportOptions, weights_sha256: dict[str, str]
) -> Source:
    logger.info("exporting %s in %s, and checking it by ONNX Runtime", part, options.dtype)
    path = folder / f"{part}.onnx"
    unit = unit_px(part, vae.config.arch_config.spatial_ratio)
    sizes = [(height // unit, width // unit) for height, width in _CHECKED_PX]
    export_onnx(vae, part, path, options=options, size=sizes[-1], dynamic=True)
    check_onnx(path, vae, part, options, sizes)
    return Source(path, options, weights_sha256, paravae.__version__)


def _build_one(
    flavour: Flavour, source: Source, target: Target, root: Path, options: BuildOptions, count: str
) -> Built:
    with progress_bar(f"building {target.file}", shown=True) as report:
        watch: Watch | None = None if report is None else lambda done: report(round(100 * done), 100)
        built = build_engine(flavour, source, target, root, options, watch)
    logger.info("%s: %s, %.1f MB, built in %.1f s", count, built.path, built.manifest.engine_bytes / 1e6, built.seconds)
    return built


def _flavour(name: str) -> Flavour:
    if name != "auto":
        return find_flavour(name)
    return find_flavour(*(FLAVOURS if torch.cuda.is_available() else reversed(FLAVOURS)))


def _build_options(args: argparse.Namespace, flavour: Flavour) -> BuildOptions:
    if args.timing_cache and not flavour.keeps_timing_cache:
        logger.warning("--timing-cache is passed over: %s times nothing when it builds", flavour.name)
    return BuildOptions(
        workspace_bytes=None if args.workspace_gib is None else int(args.workspace_gib * GIB),
        level=args.optimization_level,
        timing_cache=args.timing_cache,
        compute_capabilities=_capabilities(args.compute_capabilities, args.dtype, flavour),
    )


def _capabilities(asked: tuple[str, ...] | None, dtype: str, flavour: Flavour) -> tuple[str, ...]:
    """Of the GPUs that engines are built for."""
    here = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    if not flavour.targets:
        if here is None:
            raise ValueError(f"{flavour.name} builds for the GPU here, and there is none; --flavour tensorrt_rtx can")
        if asked is not None and asked != (here,):
            raise ValueError(
                f"--compute-capabilities {','.join(asked)}: {flavour.name} builds for {here}, the GPU here"
            )
        return (here,)
    if asked is None:
        if here in flavour.targets:
            return (here,)
        if here is not None:
            logger.warning("%s does not know the GPU here (%s): it builds for others", flavour.name, here)
        return ANY_GPU
    unknown = [capability for capability in asked if capability not in flavour.targets]
    if unknown or not asked:
        raise ValueError(
            f"--compute-capabilities {','.join(asked)}: {flavour.name} {flavour.version} builds for "
            f"{', '.join(flavour.targets)}"
        )
    if TURING in asked and dtype == "bfloat16":
        raise ValueError(f"--compute-capabilities {TURING} has no bfloat16; --dtype float16 does for it")
    return asked


def _count(engines: int) -> str:
    return f"{engines} engine" + ("s" if engines != 1 else "")
