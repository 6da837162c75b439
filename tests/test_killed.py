"""Ranks whose process ends in the middle of things, on gloo: the others raise, promptly and with its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.killed_cases import MOMENTS, Death, check_told

# Each moment in worlds of two, three and four, the victim being the first, the last, or one between.
WORLDS = [(2, 0), (3, 1), (4, 3), (2, 1), (3, 0), (4, 2), (3, 2), (4, 0)]
KILLS = [
    (moment, *WORLDS[(2 * index + turn) % len(WORLDS)])
    for index, moment in enumerate(name for name in MOMENTS if name != "before one that comes late")
    for turn in range(2)
]
KILLS += [("before one that comes late", 3, 1), ("before one that comes late", 4, 3)]


@pytest.mark.parametrize(("moment", "size", "victim"), KILLS)
def test_the_others_hear_which_was_killed(moment: str, size: int, victim: int, tmp_path: Path) -> None:
    check_told(moment, size, victim, Death(tmp_path / "note"), tmp_path / "rendezvous", most_s=5)


@pytest.mark.parametrize(("size", "victim"), [(2, 0), (3, 2), (4, 1)])
def test_the_others_hear_which_has_left(size: int, victim: int, tmp_path: Path) -> None:
    """A rank whose program has come to its end is gone as one that was killed is."""
    death = Death(tmp_path / "note", by_signal=False)
    check_told("while the others wait for it", size, victim, death, tmp_path / "rendezvous", most_s=5)
