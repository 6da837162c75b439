"""Decodes shared on SGLang's decode group, by gloo ranks: rank_cases.py has the cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs SGLang: make test-sglang")

from tests.ranks import Outcome, check, run_ranks
from tests.sglang.rank_cases import four_ranks, two_ranks

Outcomes = Mapping[str, list[Outcome]]
PRELOAD = ("tests.sglang.rank_cases",)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Outcomes:
    return run_ranks(two_ranks(model_folder), 2, tmp_path_factory.mktemp("two") / "ranks", preload=PRELOAD)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Outcomes:
    return run_ranks(four_ranks(model_folder), 4, tmp_path_factory.mktemp("four") / "ranks", preload=PRELOAD)


@pytest.mark.parametrize("case", two_ranks(Path()))
def test_two_ranks(case: str, on_two: Outcomes) -> None:
    check(on_two, case)


@pytest.mark.parametrize("case", four_ranks(Path()))
def test_four_ranks_whose_sequence_parallel_group_is_not_the_world(case: str, on_four: Outcomes) -> None:
    check(on_four, case)
