"""How a decode is carried out: its windows or tiles, what they need, and the rule by which ``auto`` chooses.

Everything here follows from numbers that all ranks share, so all come to the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from paravae.configs import VAEConfig
from paravae.vae import plan
from paravae.vae.memory import GIB, needed_bytes
from paravae.vae.plan import PatchPlan, Stages, TilePlan, Window

# Above this share of the work the busiest rank gains too little for a gather: every rank decodes alone.
_WORTHWHILE_SHARE = 0.9
_PLANS_KEPT = 64

Plan = TypeVar("Plan")


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


@dataclass(frozen=True)
class DecodePlan:
    """A choice, and the exact windows or the tiles that it comes to."""

    choice: DecodeChoice
    layout: PatchPlan | TilePlan


@dataclass(frozen=True)
class DecodePlanner:
    """The plans for latents of one ``shape`` [B, z_dim, T, h, w] and dtype; ``head_work``: multiply-adds a frame."""

    config: VAEConfig
    stages: Stages
    head_work: int
    shape: Sequence[int]
    dtype: torch.dtype

    @property
    def lat_size(self) -> tuple[int, int]:
        return self.shape[-2], self.shape[-1]

    def patches(self, ranks: int) -> PatchPlan:
        """One exact window for each of ``ranks``."""
        return plan.plan_patches(self.stages, self.lat_size, self.lat_size, ranks)

    def tiles(self) -> TilePlan:
        """The overlapping tiles that the config asks for."""
        config, ratio = self.config, self.config.arch_config.spatial_ratio
        tile_min = (config.tile_sample_min_height // ratio, config.tile_sample_min_width // ratio)
        stride = (config.tile_sample_stride_height // ratio, config.tile_sample_stride_width // ratio)
        return plan.plan_tiles(self.lat_size, tile_min, stride)

    def plan(self, mode: str | None, ranks: int, budget_bytes: int) -> DecodePlan:
        """``mode``: what a method's name asks for, None to do as configured.

        Raises:
            ValueError: what was asked for needs more than ``budget_bytes``, or nothing fits.
        """
        reason = "as configured" if mode is None else "the method called"
        if mode is None:
            alone = "tiled" if self.config.use_tiling else "single"
            mode = self.config.exact_mode if self.config.use_parallel_decode else alone
        if mode == "auto":
            mode, reason = self._auto(ranks, budget_bytes)
        layout: PatchPlan | TilePlan
        if mode == "tiled":
            layout = self.tiles()
            rows = len({tile.rows for tile in layout.tiles})
            grid = (rows, len(layout.tiles) // rows)
            traces: Sequence[Sequence[Window]] = [plan.whole(self.stages, *layout.tile)]
        else:
            layout = self.patches(ranks if mode == "patch" else 1)
            grid, traces = layout.grid, layout.traces
        refuse_over_budget(f"{mode} decode", self.shape, self.dtype, self._needed_bytes(traces), budget_bytes)
        return DecodePlan(DecodeChoice(mode, ranks, grid, reason), layout)

    def _auto(self, ranks: int, budget_bytes: int) -> tuple[str, str]:
        """The mode and its reason: exact if that fits in memory, shared if sharing saves a tenth of the work."""
        patches = self.patches(ranks)
        needed = self._needed_bytes(patches.traces)
        if needed > budget_bytes:
            limits = f"{needed / GIB:.3g} GiB a rank, {budget_bytes / GIB:.3g} are allowed"
            return "tiled", f"an exact decode needs {limits}"
        if ranks == 1:
            return "single", "there is one rank"
        share = (self.head_work + patches.work) / (self.head_work + self.patches(1).work)
        reason = f"the busiest of {ranks} ranks does {share:.0%} of the work"
        return ("patch" if share <= _WORTHWHILE_SHARE else "single"), reason

    def _needed_bytes(self, traces: Iterable[Sequence[Window]]) -> int:
        arch = self.config.arch_config
        batch, lat_frames = self.shape[0], self.shape[2]
        area_px = arch.spatial_ratio**2 * self.lat_size[0] * self.lat_size[1]
        values = batch * arch.input_channels * arch.pixel_frames(lat_frames) * area_px
        at_once = 1 if lat_frames == 1 else arch.temporal_ratio
        return needed_bytes(self.stages, traces, at_once, self.dtype, batch, values)


@dataclass(frozen=True)
class EncodePlanner:
    """The plan for pixels of one ``shape`` [B, 3, F, H, W]; ``channels``: of the features at latent size."""

    config: VAEConfig
    stages: Stages
    channels: int
    shape: Sequence[int]
    dtype: torch.dtype

    @property
    def lat_frames(self) -> int:
        return 1 + (self.shape[2] - 1) // self.config.arch_config.temporal_ratio

    @property
    def lat_size(self) -> tuple[int, int]:
        ratio = self.config.arch_config.spatial_ratio
        return self.shape[-2] // ratio, self.shape[-1] // ratio

    def patches(self, ranks: int, budget_bytes: int) -> PatchPlan:
        """One exact window for each of ``ranks``.

        Raises:
            ValueError: a window needs more than ``budget_bytes``.
        """
        patches = plan.plan_patches(self.stages, (self.shape[-2], self.shape[-1]), self.lat_size, ranks)
        batch = self.shape[0]
        at_once = 1 if self.shape[2] == 1 else self.config.arch_config.temporal_ratio
        values = batch * self.channels * self.lat_frames * self.lat_size[0] * self.lat_size[1]
        needed = needed_bytes(self.stages, patches.traces, at_once, self.dtype, batch, values)
        refuse_over_budget("encode", self.shape, self.dtype, needed, budget_bytes)
        return patches


class KeptPlans(Generic[Plan]):
    """The latest plans for one config: planning takes longer than launching what was planned."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}
        self._config: VAEConfig | None = None

    def get(self, config: VAEConfig, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """What ``make`` gave for this config (the very object) and ``key``."""
        if config is not self._config:
            self._plans.clear()
            self._config = config
        if key not in self._plans:
            if len(self._plans) >= _PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = make()
        return self._plans[key]


def refuse_over_budget(what: str, shape: Sequence[int], dtype: torch.dtype, needed: int, budget: int) -> None:
    """Raise ValueError if ``what`` needs more bytes than its budget."""
    if needed > budget:
        raise ValueError(
            f"this {what} of {list(shape)} {dtype} needs about {needed / GIB:.3g} GiB a rank, "
            f"{budget / GIB:.3g} GiB are allowed (memory_limit_gib, default: what the device has); "
            "use more ranks, a smaller picture or batch, or parallel_decode_mode 'tiled' or 'auto'"
        )
