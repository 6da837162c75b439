"""Every case of parallel_cases.py and fault_cases.py on 1, 2, 3 and 4 gloo ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parallel_cases import cases_for
from tests.ranks import Outcome, check, run_ranks

Results = dict[str, list[Outcome]]
WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """A world's results, run when first asked for."""
    known: dict[int, Results] = {}

    def run(size: int) -> Results:
        if size not in known:
            known[size] = run_ranks(cases_for(size), size, tmp_path_factory.mktemp("ranks") / "rendezvous")
        return known[size]

    return run


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in WORLDS for name in cases_for(size)])
def test_on_gloo_ranks(size: int, name: str, results_of: Callable[[int], Results]) -> None:
    check(results_of(size), name)
