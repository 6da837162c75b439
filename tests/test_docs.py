"""README and docs say what is true: tables as measured, paths that exist, the two commands that CI runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import render

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_tables_are_as_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.render", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_notices_a_changed_table() -> None:
    spoilt = re.sub(r"(?m)^\| 1024x1024 \| 2 \| ", "| 1024x1024 | 3 | ", README, count=1)
    assert spoilt != README
    assert render.render(spoilt) == README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    paths = re.findall(r"\b(?:paravae|training|benchmarks|docs)/[\w./-]*\w(?:\.py|\.md|\.sh|/)(?![\w{])", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_readme_names_the_commands_that_ci_runs() -> None:
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert all(f"make {command}" in ci for command in commands)
