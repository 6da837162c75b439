"""Write the tables of README.md and docs/ from the results in benchmarks/results.

    python -m benchmarks.render            # rewrites the blocks between the marks
    python -m benchmarks.render --check    # fails if a file would change
    python -m benchmarks.render --plot     # draws the figures of docs/ as well

A block stands between ``<!-- results: NAME -->`` and ``<!-- end -->``; one whose results are not there stays.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import modulation_tables, scaling_tables, simulation_tables
from benchmarks.markdown import by_case, figure, machine_line, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
PLOT = ROOT / "docs/single_gpu.png"
SCALING_PLOT = ROOT / "docs/scaling.png"
SIMULATION_PLOT = ROOT / "docs/simulation.png"
MODULATION_PLOT = ROOT / "docs/modulation.png"
FILES = ("README.md", "docs/measurements.md", "docs/sglang.md")
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def tiny() -> str:
    report = load("paravae-tiny")
    psnr = report["psnr_db_512"]
    return (
        f"`paravae-tiny`: base_dim {report['base_dim']}, {report['parameters'] / 1e6:.1f} M parameters, trained on "
        f"{report['train_pictures']} photographs that Python and Debian packages ship (`training/sources.py` names "
        f"them and their licences) for {report['steps']:,} steps, {report['minutes']:g} minutes of one "
        f"{report['device']}. On {psnr['pictures']} held-out photographs at 512x512 it reaches "
        f"**{psnr['mean']:.1f} dB** PSNR on average ({psnr['least']:.1f} dB on the hardest).\n"
    )


def tiny_pictures() -> str:
    report = load("paravae-tiny")
    rows = [[row["picture"], row["size"], f"{row['psnr_db']:.2f}"] for row in report["held_out"]]
    clips = f"\nMoving windows over the same pictures, 9 frames of 256x256: {report['psnr_db_clips']:.2f} dB.\n"
    return table(["held-out picture", "size", "PSNR, dB"], rows) + clips


def gpu_tests() -> str:
    report = load("gpu_tests")
    rows = [[row["what"], row["result"]] for row in report["rows"]]
    gpus = report["machine"]["ranks"]
    return f"{gpus} x {machine_line(report)}.\n\n" + table(["what", "result"], rows)


def tiling() -> str:
    report = load("tiling")
    rows = [
        [
            row["picture"], row["size"], f"{row['psnr_db']:.1f}", f"{row['diffusers_psnr_db']:.1f}",
            f"{row['latents_decoded'] / row['latents']:.2f}",
            f"{row['diffusers_latents_decoded'] / row['latents']:.2f}",
        ]
        for row in report["rows"]
    ]  # fmt: skip
    head = ["picture", "size", "paravae, dB", "diffusers, dB", "paravae's work", "diffusers' work"]
    return f"{machine_line(report)}, fp32.\n\n" + table(head, rows)


NAMES = {"paravae": "paravae", "diffusers": "diffusers", "compile": "torch.compile", "sglang": "SGLang"}


def load_if_there(name: str) -> dict[str, Any] | None:
    return load(name) if (RESULTS / f"{name}.json").is_file() else None


def single_gpu(what: str) -> str | None:
    """A line a size: everyone's time, how many times as long as paravae's, and memory."""
    report = load_if_there("single_gpu")
    if report is None:
        return None
    who = list(report["contestants"])
    names = [NAMES[name] for name in who]
    rows = []
    for case, found in by_case(report, what).items():
        own = found["paravae"]["ms"]
        times = [figure(found, name, "ms", "{:.1f}") for name in who]
        ratios = [f"{found[name]['ms'] / own:.2f}x" if "ms" in found.get(name, {}) else "-" for name in who[1:]]
        peaks = [figure(found, name, "peak_gib", "{:.2f}") for name in who]
        rows.append([case, *times, *ratios, " / ".join(peaks)])
    head = [what, *(f"{name}, ms" for name in names), *(f"against {name}" for name in names[1:])]
    text = f"{report['args']['dtype']}, {machine_line(report)}. Peak memory over the weights: {' / '.join(names)}.\n\n"
    return text + table([*head, "peak GiB"], rows)


def single_gpu_all() -> str | None:
    """A line for each contestant of each case: times, errors, memory, and shares of the machine's rates."""
    report = load_if_there("single_gpu")
    if report is None:
        return None
    rates, rows = report["rates"], []
    for what in ("decode", "encode"):
        for case, found in by_case(report, what).items():
            rows += [[f"{what} {case}", NAMES[who], *_figures(row)] for who, row in found.items()]
    head = [
        "what", "who", "ms", "p20 to p80", "max error", "RMS error", "correct", "peak GiB", "in the first calls",
        "of the matmul rate", "of the copy rate",
    ]  # fmt: skip
    text = (
        f"{report['args']['dtype']}, {machine_line(report)}; bf16 matrix product {rates['bf16_matmul_tflops']:.0f} "
        f"TFLOP/s, copy {rates['copy_gb_per_s']:.0f} GB/s.\n\n"
    )
    skipped = report.get("skipped")
    return text + table(head, rows) + (f"\nNot measured, for want of time: {'; '.join(skipped)}.\n" if skipped else "")


def _figures(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return ["failed", *[""] * 8]
    peak, first_peak = (figure({"": row}, "", name, "{:.2f}") for name in ("peak_gib", "first_peak_gib"))
    return [
        f"{row['ms']:.2f}", f"{row['p20_ms']:.2f} to {row['p80_ms']:.2f}", f"{row['max_error']:.4f}",
        f"{row['rms_error']:.5f}", "yes" if row["correct"] else "**no**", peak, first_peak,
        f"{row['matmul_share']:.0%}", f"{row['copy_share']:.0%}",
    ]  # fmt: skip


def single_gpu_compile() -> str | None:
    """diffusers' class as torch.compile makes it, in a run of its own: it takes minutes for each shape."""
    report = load_if_there("single_gpu_compile")
    if report is None:
        return None
    rows = [
        [f"{what} {case}", *(figure(found, who, "ms", "{:.1f}") for who in report["contestants"])]
        for what in ("decode", "encode")
        for case, found in by_case(report, what).items()
    ]
    head = ["", *(f"{NAMES[name]}, ms" for name in report["contestants"])]
    return f"{report['args']['dtype']}, {machine_line(report)}.\n\n" + table(head, rows)


def parts() -> str | None:
    """A line for each part of a decode: how often, how long, how near to what the machine can do."""
    report = load_if_there("parts")
    if report is None:
        return None
    rows = [
        [
            " ".join([row["part"], *row["options"]]),
            f"{row['shape']} -> {row['out_channels']}",
            str(row["count"]),
            f"{row['ms']:.3f}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['share_of_floor']:.0%}",
        ]
        for row in report["rows"]
    ]
    head = ["part", "shape", "times", "ms each", "GFLOP", "MB", "of what is possible"]
    total = sum(row["count"] * row["ms"] for row in report["rows"])
    return f"{machine_line(report)}. Together {total:.2f} ms.\n\n" + table(head, rows)


def scaling_reports() -> scaling_tables.Reports:
    """{ranks: report} of the worlds that were run, with the videos if they are a run of their own."""
    reports = {}
    for ranks in scaling_tables.WORLDS:
        parts = [load_if_there(f"scaling_{ranks}{part}") for part in ("", "_video")]
        if found := [part for part in parts if part is not None]:
            run_too = {f"{row['what']} {row['size']}, {row['frames']} frames" for part in found for row in part["rows"]}
            rows = [row for part in found for row in part["rows"]]
            skipped = [case for part in found for case in part["skipped"] if case not in run_too]
            reports[ranks] = {**found[0], "rows": rows, "skipped": skipped}
    return reports


BLOCKS: dict[str, Callable[[], str | None]] = {
    "single_gpu-compile": single_gpu_compile,
    "parts": parts,
    "single_gpu": lambda: single_gpu("decode"),
    "single_gpu-encode": lambda: single_gpu("encode"),
    "single_gpu-all": single_gpu_all,
    "scaling": lambda: scaling_tables.beside_peers(scaling_reports()),
    "scaling-all": lambda: scaling_tables.everyone(scaling_reports()),
    "scaling-plans": lambda: scaling_tables.plans(scaling_reports()),
    "in-sglang": lambda: scaling_tables.in_sglang(load_if_there("sglang_plugin_2")),
    "simulation": lambda: simulation_tables.times(load_if_there("simulation")),
    "modulation": lambda: modulation_tables.beside_peers(load_if_there("modulation")),
    "modulation-all": lambda: modulation_tables.everyone(load_if_there("modulation")),
    "tiny": tiny,
    "tiny-pictures": tiny_pictures,
    "gpu-tests": gpu_tests,
    "tiling": tiling,
}


def render(text: str) -> str:
    def rendered(block: re.Match[str]) -> str:
        inside = BLOCKS[block[2]]()
        return block[0] if inside is None else f"{block[1]}{inside}{block[3]}"

    return _BLOCK.sub(rendered, text)


def plot() -> None:
    """Draw the figures of docs/ whose results are there."""
    from benchmarks import modulation_plot, scaling_plot, simulation_plot
    from benchmarks import plot as single_gpu_plot  # matplotlib: tables need not wait for it

    report, reports = load_if_there("single_gpu"), scaling_reports()
    if report is not None:
        cases = {what: by_case(report, what) for what in ("decode", "encode")}
        single_gpu_plot.draw(cases, NAMES, PLOT, _plot_title(report))
    if reports:
        scaling_plot.draw(reports, SCALING_PLOT, _plot_title(reports[max(reports)]))
    if (simulated := load_if_there("simulation")) is not None:
        simulation_plot.draw(simulated, SIMULATION_PLOT)
    if (modulation := load_if_there("modulation")) is not None:
        title = f"The modulation of a transformer's block, {modulation['args']['dtype']}: {machine_line(modulation)}"
        modulation_plot.draw(modulation, MODULATION_PLOT, title)


def _plot_title(report: dict[str, Any]) -> str:
    return f"Qwen-Image's VAE, batch 1, {report['args']['dtype']}: {machine_line(report)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    parser.add_argument("--plot", action="store_true", help="draw the figures of docs/ too")
    args = parser.parse_args()
    check = args.check
    if args.plot:
        plot()
    stale = []
    for name in FILES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        rendered = render(text)
        if rendered != text:
            stale.append(name)
            if not check:
                path.write_text(rendered, encoding="utf-8")
    if stale:
        print(f"{'not up to date' if check else 'rewritten'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
