"""The parts of a rendered table that all blocks share."""

from __future__ import annotations

from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def machine_line(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers") if machine.get(name))
    return f"{machine['device']}, {versions}, {machine['date']}"


def by_case(report: dict[str, Any], what: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of decodes or encodes: {size and length: {who: row}}, in the file's order."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["what"] == what:
            length = f", {row['frames']} frames" if row["frames"] > 1 else ""
            found.setdefault(row["size"] + length, {})[row["who"]] = row
    return found


def figure(found: dict[str, dict[str, Any]], who: str, name: str, form: str) -> str:
    """A value of ``who``'s row as text: "-" where there is none."""
    row = found.get(who, {})
    if "failed" in row:
        return "failed"
    return "-" if row.get(name) is None else form.format(row[name])
