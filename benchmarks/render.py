"""Write the tables of README.md and docs/ from the results in benchmarks/results.

    python -m benchmarks.render            # rewrites the blocks between the marks
    python -m benchmarks.render --check    # fails if a file would change

A block stands between ``<!-- results: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
FILES = ("README.md", "docs/measurements.md")
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def machine_line(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers") if machine.get(name))
    return f"{machine['device']}, {versions}, {machine['date']}"


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


def modes(names: list[str]) -> str:
    """One line for each way to decode: the single-GPU rows of the first file, the shared ones of each."""
    reports = [load(name) for name in names]
    first = reports[0]
    diffusers = next(row for row in first["rows"] if row["who"] == "diffusers" and row["mode"] == "eager")
    rows = []
    for report in reports:
        for row in report["rows"]:
            shared = row["who"] == "paravae" and row["mode"] != "single"
            repeated = not shared and report is not first
            if repeated or (row["mode"] == "patch" and report["machine"]["ranks"] == 1):
                continue
            who = "diffusers" if row["who"] == "diffusers" else "paravae"
            how = row["mode"] if row["mode"] != "auto" else f"auto ({row['ran']})"
            rows.append([
                f"{who} {how}", str(report["machine"]["ranks"] if shared else 1), f"{row['ms']:.1f}",
                f"{diffusers['ms'] / row['ms']:.2f}x", f"{row['max_error']:.4f}", f"{row['rms_error']:.5f}",
                f"{row['peak_gib']:.2f}",
            ])  # fmt: skip
    head = ["decode", "GPUs", "ms", "against diffusers", "max error", "RMS error", "peak GiB over weights"]
    return f"{first['size']}, {first['dtype']}, {machine_line(first)}.\n\n" + table(head, rows)


def modes_readme() -> str:
    return modes(["modes_1024_bf16_1", "modes_1024_bf16_2", "modes_1024_bf16_4"])


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


BLOCKS: dict[str, Callable[[], str]] = {
    "tiny": tiny,
    "tiny-pictures": tiny_pictures,
    "modes-1024": modes_readme,
    "modes-2048": lambda: modes(["modes_2048_bf16_4"]),
    "modes-fp32": lambda: modes(["modes_1024_fp32_4"]),
    "gpu-tests": gpu_tests,
    "tiling": tiling,
}


def render(text: str) -> str:
    return _BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]]()}{block[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    check = parser.parse_args().check
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
