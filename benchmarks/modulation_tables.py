"""The tables of modulation.json: the modulation of a transformer's block, op by op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import figure, machine_line, table

OURS, OURS_LAZY, SGLANG, EAGER = "paravae", "paravae-lazy", "sglang", "diffusers"
COMPILED = ("compile", "compile-lazy")
NAMES = {
    OURS: "paravae",
    OURS_LAZY: "paravae, lazy gates",
    SGLANG: "SGLang",
    "compile": "torch.compile",
    "compile-lazy": "torch.compile, lazy gates",
    EAGER: "eager PyTorch",
}
OPS = {
    "select01": "select01",
    "residual_select01": "residual, select01",
    "plain": "plain",
    "residual_plain": "residual, plain",
    "closing": "closing residual",
    "block": "block",
}
SHOWN = {"select01": OURS, "residual_select01": OURS, "block": OURS_LAZY}
"""The ops of the README's table and figure, and which of paravae's stands there beside SGLang."""
CHANNELS = 3072

Found = dict[str, dict[str, Any]]
"""{who: row}, of one op and shape"""
Key = tuple[int, int, int, str]


def beside_peers(report: dict[str, Any] | None) -> str | None:
    """A line for each shape of Qwen-Image's width: times, against SGLang, and shares of the copy rate."""
    if report is None:
        return None
    cases = by_op(report)
    rows = []
    for batch, tokens in dict.fromkeys((batch, tokens) for channels, batch, tokens, _ in cases if channels == CHANNELS):
        cells = [str(batch), str(tokens)]
        for op, own in SHOWN.items():
            found = cases.get((CHANNELS, batch, tokens, op), {})
            times = [_us(found, own), ratio(found, own, [SGLANG]), figure(found, own, "copy_share", "{:.0%}")]
            cells += times
        rows.append([*cells, ratio(found, own, COMPILED), ratio(found, own, [EAGER])])
    head = ["B", "L"]
    for op, own in SHOWN.items():
        name = OPS[op] + ", lazy gates" * (own == OURS_LAZY)
        head += [f"{name}, us", "against SGLang", "of the copy rate"]
    head += ["against torch.compile", "against eager PyTorch"]
    return _text(report, f"C = {CHANNELS}", [table(head, rows)])


def everyone(report: dict[str, Any] | None) -> str | None:
    """A line for each op and shape with everyone's times and shares; and one for each op and output with errors."""
    if report is None:
        return None
    cases = by_op(report)
    who = [name for name in NAMES if name in report["contestants"]]
    rows = [
        [OPS[op], str(batch), str(tokens), str(channels), *(_time_and_share(found, name) for name in who)]
        for (channels, batch, tokens, op), found in cases.items()
    ]
    errors = []
    for op, output in dict.fromkeys(
        (row["case"], output) for row in report["rows"] for output in row.get("errors", ())
    ):
        same = [row for row in report["rows"] if row["case"] == op and output in row.get("errors", ())]
        errors.append([OPS[op], output, *(_largest_error(same, output, name) for name in who)])
    names = [NAMES[name] for name in who]
    times = table(["op", "B", "L", "C", *names], rows)
    told = "\nLargest RMS error of any shape, and largest single one, against fp64:\n\n"
    return _text(
        report, "Microseconds, and the share of the copy rate", [times, told, table(["op", "of", *names], errors)]
    )


def by_op(report: dict[str, Any]) -> dict[Key, Found]:
    """{(channels, batch, tokens, op): {who: row}}, ordered so."""
    found: dict[Key, Found] = {}
    for row in report["rows"]:
        key = (row["channels"], row["batch"], row["tokens"], row["case"])
        found.setdefault(key, {})[row["who"]] = row
    return dict(sorted(found.items(), key=lambda item: (*item[0][:3], list(OPS).index(item[0][3]))))


def ratio(found: Found, own: str, others: Sequence[str]) -> str:
    """How many times as long as ``own`` the fastest of the others takes."""
    times = [found[name]["ms"] for name in others if "ms" in found.get(name, {})]
    if not times or "ms" not in found.get(own, {}):
        return "-"
    return f"{min(times) / found[own]['ms']:.2f}x"


def _us(found: Found, who: str) -> str:
    return f"{1e3 * found[who]['ms']:.1f}" if "ms" in found.get(who, {}) else figure(found, who, "ms", "")


def _time_and_share(found: Found, who: str) -> str:
    row = found.get(who, {})
    if "ms" not in row:
        return figure(found, who, "ms", "")
    wrong = "" if row["correct"] else " **not correct**"
    return f"{_us(found, who)}, {row['copy_share']:.0%}{wrong}"


def _largest_error(rows: Sequence[dict[str, Any]], output: str, who: str) -> str:
    own = [row["errors"][output] for row in rows if row["who"] == who]
    if not own:
        return "-"
    return f"{max(one['rms_error'] for one in own):.5f}, {max(one['max_error'] for one in own):.4f}"


def _text(report: dict[str, Any], what: str, parts: Sequence[str]) -> str:
    skipped = report.get("skipped")
    left = f"\nNot measured, for want of time: {'; '.join(skipped)}.\n" if skipped else ""
    rate = f"copy {report['rates']['copy_gb_per_s']:.0f} GB/s"
    return f"{what}; {report['args']['dtype']}, {machine_line(report)}, {rate}.\n\n" + "".join(parts) + left
