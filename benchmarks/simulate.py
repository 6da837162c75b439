"""What 1 to 64 GPUs would make of a decode, by the cost model: a PREDICTION, not a measurement. It needs no GPU.

    python -m benchmarks.simulate                      # writes benchmarks/results/simulation.json
    python -m benchmarks.simulate --price 2.5 --cost-table calibrated.json

For each picture, link and number of GPUs: what ``paravae plan`` would choose, its time, speed-up and efficiency over
one GPU, and what a picture costs at the price of a GPU's hour, which is an assumption, too. The GPUs are those of --gpu
throughout, whatever link is between them. What the computing takes, and what ranks take to keep in step, are the
machine's constants (``vae/machines.json``, or --cost-table). What is between the GPUs is assumed:

NVLink
    The machine's own constants: measured between few GPUs of one host. As if all 64 were in one NVLink domain.
PCIe 5 x16
    32 GT/s on 16 lanes in 128b/130b is 63 GB/s each way (PCI Express Base Specification 5.0); 70 % of it, 44 GB/s, is
    taken to be reached, as if every GPU had such a slot to itself and a switch that keeps up.
100 GbE
    12.5 GB/s each way by its name (IEEE 802.3ba); 90 % of it, 11.25 GB/s, is taken to be reached, with a network card
    for each GPU. The ranks are on hosts of their own: keeping in step takes 0.1 ms more.

An all-gather of N ranks is a ring of N - 1 steps: beyond the second rank each adds what NCCL's own tuner reckons with
for a step of the Simple protocol, 3.4 us over NVLink, 5.7 us over PCIe, 14 us over a network (``hwLat`` in NCCL's
src/graph/tuning.cc). The first costs what the machine's constants say, over other links by that step's difference more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from paravae import AutoencoderKLQwenImage
from paravae.configs.cli import number
from paravae.files import whole_file
from paravae.launch.bench_cases import Case, pixel_size
from paravae.launch.machine import describe
from paravae.launch.models import DTYPES
from paravae.launch.plan import ASSUMED_GPU
from paravae.launch.planned import planner_of
from paravae.vae.cost import Link, Machine, machine_of

OUTPUT = Path(__file__).parent / "results/simulation.json"
RANKS = (1, 2, 4, 8, 16, 32, 64)
CASES = (
    Case("decode", 1024, 1024, 1),
    Case("decode", 2048, 2048, 1),
    Case("decode", 4096, 4096, 1),
    Case("decode", 832, 480, 81),
)
WORTH, LEAST_EFFICIENCY = 0.95, 0.5
"""More GPUs pay as long as they bring the time down by 5 %; and as long as no more than half of them is wasted."""
_PRICE = 3.0
_NVLINK_HOP_MS = 3.4e-3
_ANY_MEMORY = 2**62


@dataclass(frozen=True)
class Wire:
    """What is between the GPUs. ``gb_per_s``: 10^9 bytes a second that a rank receives, None: the machine's own;
    ``hop_ms``: of a ring's step; ``more_step_ms``: to keep in step, over the machine's own."""

    name: str
    gb_per_s: float | None
    hop_ms: float
    more_step_ms: float = 0.0

    def link(self, own: Link, ranks: int) -> Link:
        """Between that many GPUs, of which the machine's ``own`` link is NVLink."""
        latency = own.latency_ms - _NVLINK_HOP_MS + self.hop_ms * max(1, ranks - 1)
        return Link(max(0.0, latency), self.gb_per_s or own.gb_per_s, own.step_ms + self.more_step_ms)


WIRES = (Wire("NVLink", None, _NVLINK_HOP_MS), Wire("PCIe 5 x16", 44.0, 5.7e-3), Wire("100 GbE", 11.25, 14e-3, 0.1))


def simulate(machine: Machine, dtype: torch.dtype, price: float, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """A row for each case, link and number of GPUs. ``price``: of a GPU's hour."""
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage()
    rows = []
    for case in cases:
        shape = case.latents_shape(vae.config.arch_config)
        for wire in WIRES:
            one_ms = None
            for ranks in RANKS:
                over = replace(machine, link=wire.link(machine.link, ranks))
                planner = planner_of(vae, over, shape, dtype, torch.device("cuda"), ranks)
                choice = planner.plan("auto", _ANY_MEMORY).choice
                one_ms = one_ms or choice.ms
                rows.append({
                    **case.head(), "link": wire.name, "ranks": ranks, "ms": choice.ms,
                    "speedup": round(one_ms / choice.ms, 4), "efficiency": round(one_ms / choice.ms / ranks, 4),
                    "cost": round(ranks * choice.ms / 3.6e6 * price, 9), "how": choice.how, "gib": choice.gib,
                })  # fmt: skip
    return rows


def ends(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case and link: the most GPUs that bring the time down by enough, and the most that are used well."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["what"], row["size"], row["frames"], row["link"]), []).append(row)
    return [
        {
            **dict(zip(("what", "size", "frames", "link"), key, strict=True)),
            "faster_up_to": _faster_up_to(series),
            "efficient_up_to": max(row["ranks"] for row in series if row["efficiency"] >= LEAST_EFFICIENCY),
        }
        for key, series in found.items()
    ]


def _faster_up_to(series: Sequence[dict[str, Any]]) -> int:
    for fewer, more in pairwise(series):
        if more["ms"] > WORTH * fewer["ms"]:
            return fewer["ranks"]
    return series[-1]["ranks"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default=ASSUMED_GPU, help="by the name that CUDA gives it (default: %(default)s)")
    parser.add_argument("--cost-table", type=Path, help="of paravae bench calibrate (default: the shipped constants)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--price", type=number, default=_PRICE, help="of a GPU's hour in US dollars: assumed (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not args.price > 0:
        parser.error(f"--price is {args.price:g}, needs to be positive")
    try:
        machine = machine_of(args.cost_table, args.gpu)
    except ValueError as error:
        parser.error(str(error))
    rows = simulate(machine, DTYPES[args.dtype], args.price)
    stated = describe(1)
    report = {
        "what": "a prediction of the cost model, not a measurement",
        "gpu": args.gpu,
        "constants": {"of": machine.name, "source": machine.source},
        "dtype": args.dtype,
        "price": args.price,
        "links": {wire.name: [vars(wire.link(machine.link, ranks)) for ranks in (2, RANKS[-1])] for wire in WIRES},
        "assumptions": (__doc__ or "").split("\n\n", 2)[2].strip(),
        "made": {name: stated[name] for name in ("paravae", "commit", "date")},
        "rows": rows,
        "ends": ends(rows),
    }
    with whole_file(args.output) as part:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for end in report["ends"]:
        case = Case("decode", *pixel_size(end["size"]), end["frames"])
        ends_at = f"faster up to {end['faster_up_to']} GPUs, half used up to {end['efficient_up_to']}"
        print(f"{case} over {end['link']}: {ends_at}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
