"""The table of simulation.json: predicted times over numbers of GPUs and links."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import table


def times(report: dict[str, Any] | None) -> str | None:
    """Two tables, a line for each picture and link: times with efficiencies, and where more GPUs stop paying; costs."""
    if report is None:
        return None
    series = series_of(report)
    ranks = list(dict.fromkeys(row["ranks"] for row in report["rows"]))
    ends = {(case_of(end), end["link"]): end for end in report["ends"]}
    lines, costs = [], []
    for (case, link), rows in series.items():
        end = ends[case, link]
        cells = [f"{row['ms']:.1f}, {row['efficiency']:.0%}" for row in rows]
        more = "+" if end["faster_up_to"] == ranks[-1] else ""
        lines.append([case, link, *cells, f"{end['faster_up_to']}{more}", str(end["efficient_up_to"])])
        costs.append([case, link, *(f"{1e3 * row['cost']:.3f}" for row in rows)])
    constants = report["constants"]
    text = (
        f"**Predicted, not measured**: `python -m benchmarks.simulate`, {report['made']['date']}. {report['dtype']}, "
        f"batch 1, {report['gpu']} throughout. Constants of {constants['of']}: {constants['source']}. What is assumed "
        "of the links stands in `benchmarks/simulate.py`.\n\n"
        "Milliseconds, and efficiency over one GPU; the most GPUs that still bring the time down by 5 %, and the most "
        "that are used by half or better:\n\n"
    )
    text += table(["decode", "link", *_gpus(ranks), "faster up to", "half used up to"], lines)
    text += f"\nUS dollars for a thousand decodes, at an assumed {report['price']:g} an hour for each GPU:\n\n"
    return text + table(["decode", "link", *_gpus(ranks)], costs)


def series_of(report: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(case, link): rows, fewest GPUs first}"""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault((case_of(row), row["link"]), []).append(row)
    return found


def case_of(row: dict[str, Any]) -> str:
    return row["size"] + (f", {row['frames']} frames" if row["frames"] > 1 else "")


def _gpus(ranks: list[int]) -> list[str]:
    return [f"{count} GPU{'s' if count > 1 else ''}" for count in ranks]
