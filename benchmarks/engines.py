"""A VAE that is asked to decode by TensorRT engines, beside the same without: what ran, the pixels, the time.

    paravae engine build --output FOLDER --sizes 1024x1024
    python -m benchmarks.engines --engines FOLDER --output benchmarks/results/engines.json

Where TensorRT takes this GPU the times are its engines', whose pixels `paravae engine verify` judges. Where it does
not, PyTorch stands in: then the times say what asking costs, and both pictures have to be the same bits.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case_runner import exit_status
from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
from paravae.configs.trt import TrtVAEConfig
from paravae.launch import bench, bench_report
from paravae.launch.bench_cases import Case, make_cases, pixel_size
from paravae.launch.bench_timing import interleaved_ms, spread
from paravae.launch.machine import describe, version_of
from paravae.launch.models import DTYPES, add_checkpoint_flags
from paravae.launch.world import Place, World, world

RESULTS = Path(__file__).parent / "results/engines.json"
_NOTES = {
    "times": "ms, p20_ms, p80_ms: of single decodes, by CUDA events on a GPU (the clock on a CPU), both in turns; "
    "first_s: of the very first, by the clock, in which TensorRT starts or refuses to.",
    "same_bits": "whether the picture is that of the VAE that was not asked to use engines.",
    "ran": "calls by TensorRT, and by PyTorch in its place; fallbacks: why.",
}


class Heard(logging.Handler):
    """Keeps the warnings of paravae."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def compare(case: Case, args: argparse.Namespace, here: World) -> list[dict[str, Any]]:
    """A row for each of the two."""
    engines = TrtVAEConfig(trt_engine_path=str(args.engines))
    configs = {
        "pytorch": QwenImageVAEConfig(load_encoder=False),
        "tensorrt": QwenImageVAEConfig(load_encoder=False, vae_type="tensorrt", trt_vae_config=engines),
    }
    vaes = {
        vae_type: AutoencoderKLQwenImage.from_pretrained(
            args.model, args.subfolder, torch_dtype=DTYPES[args.dtype], device=here.device, vae_config=config
        )
        for vae_type, config in configs.items()
    }
    latents = case.draw_input(vaes["pytorch"].config.arch_config).to(here.device, DTYPES[args.dtype])
    calls: dict[str, Callable[[], Tensor]] = {name: partial(vae.decode, latents) for name, vae in vaes.items()}
    rows, pictures = [], {}
    for name, call in calls.items():
        start = time.perf_counter()
        pictures[name] = call().cpu()
        rows.append({"vae_type": name, "size": case.size, "first_s": round(time.perf_counter() - start, 3)})
        for _ in range(args.warmup):
            call()
    times = interleaved_ms(calls, dict.fromkeys(calls, args.repeats), here.device, here.group)
    for row in rows:
        row |= {**spread(times[row["vae_type"]]), "same_bits": torch.equal(*pictures.values())}
    rows[-1] |= vaes["tensorrt"].engine_report()
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, required=True, metavar="FOLDER", help="what `engine build` made")
    parser.add_argument("--sizes", type=pixel_size, nargs="+", default=[(1024, 1024)], metavar="WxH",
                        help="of the pictures, in pixels (default: 1024x1024)")  # fmt: skip
    add_checkpoint_flags(parser)
    bench.add_timing_flags(parser)
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: benchmarks/results/...)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Its exit status: 0 done, 1 PyTorch stood in and its picture is another, 2 bad input."""
    parser = build_parser()
    args = parser.parse_args(arguments)

    def body() -> None:
        with world(Place(), args.device) as here, torch.no_grad():
            bench.check_timing_and_output(args, here)
            run(args, here)

    return exit_status(parser, body)


def run(args: argparse.Namespace, here: World) -> None:
    """Compare at each size.

    Raises:
        RuntimeError: where PyTorch stood in its picture is not that of PyTorch alone; all is written by then.
    """
    heard = Heard()
    logging.getLogger("paravae").addHandler(heard)
    try:
        cases = make_cases(["decode"], args.sizes, [1], QwenImageVAEConfig().arch_config)
        rows = [row for case in cases for row in compare(case, args, here)]
    finally:
        logging.getLogger("paravae").removeHandler(heard)
    wheels = ("tensorrt", "tensorrt_rtx_cu13_bindings")
    head = {
        "what": "decoding by engines, where they run, beside decoding by PyTorch",
        "machine": describe(1) | {name: version_of(name) for name in wheels},
        "args": {"model": Path(args.model).name, "dtype": args.dtype, "repeats": args.repeats, "warmup": args.warmup},
        "notes": _NOTES,
        "logged": heard.lines,
    }
    bench_report.write(args.output, head, rows)
    for row in rows:
        print(row)
    if any(row.get("ran", {}).get("pytorch") and not row["same_bits"] for row in rows):
        raise RuntimeError("PyTorch stood in for an engine, and its picture is not that of PyTorch alone")


if __name__ == "__main__":
    sys.exit(main())
