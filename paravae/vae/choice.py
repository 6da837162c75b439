"""How a decode is carried out, and the rule by which ``auto`` chooses: from numbers that all ranks share."""

from __future__ import annotations

from dataclasses import dataclass

from paravae.vae.memory import GIB

# Above this share of the work the busiest rank gains too little for a gather: every rank decodes alone.
_WORTHWHILE_SHARE = 0.9


@dataclass(frozen=True)
class DecodeChoice:
    """``mode``: single, patch or tiled; ``grid``: windows down and across; ``reason``: why this mode."""

    mode: str
    ranks: int
    grid: tuple[int, int]
    reason: str

    @property
    def how(self) -> str:
        """In words, such as "patch, 2 x 1 windows on 2 ranks"."""
        ranks = f"{self.ranks} rank" + ("s" if self.ranks > 1 else "")
        if self.mode == "single":
            return f"single on {ranks}" if self.ranks == 1 else f"single on each of {ranks}"
        return f"{self.mode}, {self.grid[0]} x {self.grid[1]} windows on {ranks}"


def auto_mode(ranks: int, share: float, needed_bytes: int, budget_bytes: int) -> tuple[str, str]:
    """The mode and its reason: exact if that fits in memory, shared if sharing saves a tenth of the work.

    ``share``: what the busiest rank does in patch mode, as a fraction of the work of one rank alone.
    ``needed_bytes``: what it needs for that, of the ``budget_bytes`` allowed.
    """
    if needed_bytes > budget_bytes:
        return (
            "tiled",
            f"an exact decode needs {needed_bytes / GIB:.3g} GiB a rank, {budget_bytes / GIB:.3g} are allowed",
        )
    if ranks == 1:
        return "single", "there is one rank"
    done = f"the busiest of {ranks} ranks does {share:.0%} of the work"
    return ("patch" if share <= _WORTHWHILE_SHARE else "single"), done
