"""The tables of the scaling_*.json: decodes over 1, 2, 4 and 8 ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.markdown import by_case, figure, machine_line, table

WORLDS = (1, 2, 4, 8)
OURS, OURS_ALONE, DIFFUSERS = "paravae", "paravae-alone", "diffusers"
NAMES = {
    OURS: "paravae",
    OURS_ALONE: "paravae, one GPU",
    "paravae-tiled": "paravae tiled",
    DIFFUSERS: "diffusers, one GPU",
    "sglang-spatial_shard": "SGLang spatial_shard",
    "sglang-auto": "SGLang auto",
    "distvae-rows": "DistVAE rows",
    "distvae-tiles": "DistVAE tiles",
}
RIVALS = ("sglang-spatial_shard", "distvae-rows", DIFFUSERS)
IN_SGLANG = {
    "paravae-in-sglang-auto": "paravae, by SGLang's calls",
    "sglang-auto": "SGLang's class, auto (its default)",
    "sglang-spatial_shard": "SGLang's class, spatial_shard",
    "sglang-patch": "SGLang's class, patch",
}

Reports = dict[int, dict[str, Any]]
"""{ranks: report}"""
Found = dict[str, dict[str, Any]]
"""{who: row}, of one case"""


def beside_peers(reports: Reports) -> str | None:
    """A line for each case and world: times, and how many times as long the others take."""
    if not reports:
        return None
    rows = []
    for case, ranks, found in each_case(reports):
        own, one = found[OURS]["ms"], one_gpu_ms(found, ranks)
        ratios = [f"{found[name]['ms'] / own:.2f}x" if "ms" in found.get(name, {}) else "-" for name in RIVALS]
        gain = "-" if one is None else f"{one / own:.2f}x, {one / own / ranks:.0%}"
        rows.append([case, str(ranks), *(figure(found, who, "ms", "{:.1f}") for who in (OURS, *RIVALS)), *ratios, gain])
    names = [NAMES[who] for who in RIVALS]
    head = ["decode", "ranks", "paravae, ms", *(f"{name}, ms" for name in names)]
    head += [*(f"against {name}" for name in names), "against itself on one GPU, efficiency"]
    return _text(reports, head, rows)


def everyone(reports: Reports) -> str | None:
    """A line for each contestant of each case and world."""
    if not reports:
        return None
    rows = [
        [case, str(ranks), NAMES[who], *_figures(row)]
        for case, ranks, found in each_case(reports)
        for who, row in found.items()
        if who in NAMES
    ]
    head = ["decode", "ranks", "who", "ms", "p20 to p80", "calls", "max error", "RMS error", "correct"]
    return _text(reports, [*head, "largest difference from one GPU", "peak GiB a rank", "what ran"], rows)


def in_sglang(report: dict[str, Any] | None) -> str | None:
    """A line for each case and class that SGLang's calls ran: times and errors."""
    if report is None:
        return None
    rows = [
        [case, name, f"{found[who]['ms']:.1f}", f"{found[who]['ms'] / found[next(iter(IN_SGLANG))]['ms']:.2f}x",
         f"{found[who]['max_error']:.3f}", f"{found[who]['rms_error']:.4f}", f"{found[who]['peak_gib']:.2f}"]
        for case, found in by_case(report, "decode").items()
        for who, name in IN_SGLANG.items()
    ]  # fmt: skip
    head = ["decode", "who", "ms", "time over paravae's", "max error", "RMS error", "peak GiB a rank"]
    ranks = report["machine"]["ranks"]
    return f"{ranks} x {machine_line(report)}; {report['args']['dtype']}.\n\n" + table(head, rows)


def plans(reports: Reports) -> str | None:
    """A line for each way to decode, of the cases of which all were timed: measured beside predicted, fastest first."""
    rows = []
    for case, ranks, found in each_case(reports):
        ways = [row for who, row in found.items() if is_way(who) and "ms" in row]
        chosen = found[OURS].get("ran")
        for row in sorted(ways, key=lambda row: row["ms"]):
            error = f"{row['predicted_ms'] / row['ms'] - 1:+.0%}"
            mark = "chosen" if row["ran"] == chosen else ""
            rows.append([case, str(ranks), row["ran"], f"{row['ms']:.2f}", f"{row['predicted_ms']:.2f}", error, mark])
    if not rows:
        return None
    return _text(reports, ["decode", "ranks", "plan", "ms", "predicted, ms", "error", "auto"], rows)


def is_way(who: str) -> bool:
    """Whether a contestant is one of the ways of decoding that auto chooses from."""
    return who == "paravae-tiled" or (who.startswith("paravae-") and who not in NAMES)


def each_case(reports: Reports) -> Iterator[tuple[str, int, Found]]:
    """(case, ranks, {who: row}): a case's worlds side by side, in the order of the first file that has it."""
    worlds = {ranks: by_case(reports[ranks], "decode") for ranks in sorted(reports)}
    for case in dict.fromkeys(case for cases in worlds.values() for case in cases):
        for ranks, cases in worlds.items():
            if case in cases:
                yield case, ranks, cases[case]


def one_gpu_ms(found: Found, ranks: int) -> float | None:
    """paravae's time on one GPU, of the same run."""
    return found.get(OURS if ranks == 1 else OURS_ALONE, {}).get("ms")


def _text(reports: Reports, head: list[str], rows: list[list[str]]) -> str:
    lines: dict[str, list[str]] = {}
    for ranks in sorted(reports):
        lines.setdefault(f"{reports[ranks]['args']['dtype']}, {machine_line(reports[ranks])}", []).append(str(ranks))
    machines = [f"{', '.join(ranks)} rank{'s' * (ranks != ['1'])}: {line}." for line, ranks in lines.items()]
    left = [f"{case} on {ranks}" for ranks in sorted(reports) for case in reports[ranks].get("skipped", [])]
    absent = [str(ranks) for ranks in WORLDS if ranks not in reports]
    listed = ", ".join(absent[:-1]) + " and " * (len(absent) > 1) + "".join(absent[-1:])
    notes = [f"Not run: {listed} ranks."] if absent else []
    notes += [f"Not measured, for want of time: {'; '.join(left)}."] if left else []
    return "\n".join([*machines, "", table(head, rows)]) + ("\n" + " ".join(notes) + "\n" if notes else "")


def _figures(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return ["failed", *[""] * 7, row["failed"].replace("|", "/")]
    tiles = "from_exact_max" in row  # judged by the same tiles on one GPU, shown against the exact decode as all are
    names = ("from_exact_max", "from_exact_rms") if tiles else ("max_error", "rms_error")
    return [
        f"{row['ms']:.2f}", f"{row['p20_ms']:.2f} to {row['p80_ms']:.2f}", str(row["calls"]), f"{row[names[0]]:.4f}",
        f"{row[names[1]]:.5f}", ("as tiles" if tiles else "yes") if row["correct"] else "**no**",
        figure({"": row}, "", "from_alone_max", "{:.4f}"), figure({"": row}, "", "peak_gib", "{:.2f}"),
        row.get("ran", ""),
    ]  # fmt: skip
