"""How a decode or encode is carried out: its windows or tiles, what they need, and which of them ``auto`` chooses.

Everything here follows from numbers that all ranks share, so all come to the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

import torch

from paravae.configs import VAEConfig
from paravae.vae import plan
from paravae.vae.cost import DecodeCost, Machine
from paravae.vae.engines.base import Engine, Load
from paravae.vae.memory import GIB
from paravae.vae.plan import PatchPlan, TilePlan, Window

_PLANS_KEPT = 64
_MOST_TILES_AT_ONCE = 4  # as much as a decode of 512 x 512 pixels: the GPU is full
# By which a plan for many must be faster than a simpler one: predictions are that uncertain.
_WORTHWHILE = 0.97

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class DecodeChoice:
    """``mode``: single, patch or tiled; ``grid``: windows or tiles down and across; ``reason``: why this mode.

    ``head``: own, each rank runs the network's head for itself, or shared, each its rows of it. ``groups``: of ranks,
    that the images of a batch are dealt to. ``ms``: predicted; ``gib``: needed over the weights on a rank, estimated.
    """

    mode: str
    ranks: int
    grid: tuple[int, int]
    reason: str
    head: str = "own"
    groups: int = 1
    ms: float = 0.0
    gib: float = 0.0

    @property
    def how(self) -> str:
        """In words, such as "patch, 2 x 1 windows, head shared, on 2 ranks"."""
        ranks = f"{self.ranks} rank" + ("s" if self.ranks > 1 else "")
        if self.mode == "single":
            return f"single on {ranks}" if self.ranks == 1 else f"single on each of {ranks}"
        parts = [self.mode]
        if self.groups > 1:
            parts.append(f"images dealt to {self.groups} groups")
        parts.append(f"{self.grid[0]} x {self.grid[1]} {'tiles' if self.mode == 'tiled' else 'windows'}")
        if self.head == "shared":
            parts.append("head shared")
        return f"{', '.join(parts)}{',' if self.head == 'shared' else ''} on {ranks}"


@dataclass(frozen=True)
class DecodePlan:
    """A choice, and the exact windows or the tiles that it comes to. ``needed_bytes``: over the weights, on a rank;
    ``kept_bytes``: of them, for what the ranks exchange."""

    choice: DecodeChoice
    layout: PatchPlan | TilePlan
    needed_bytes: int
    kept_bytes: int = 0


@dataclass(frozen=True)
class DecodePlanner:
    """The plans for latents of one ``shape`` [B, z_dim, T, h, w] and dtype, on ``ranks`` of a ``machine``.

    ``pixel_bytes``: of a value of the result.
    """

    config: VAEConfig
    engine: Engine
    machine: Machine
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    ranks: int
    pixel_bytes: int

    @property
    def lat_size(self) -> tuple[int, int]:
        return self.shape[-2], self.shape[-1]

    @cached_property
    def cost(self) -> DecodeCost:
        """What predicts the times."""
        return DecodeCost(
            front=self.engine.decoder_front,
            tail=self.engine.decoder_stages,
            channels=self.engine.attention_channels,
            shape=self.shape,
            value_bytes=self.dtype.itemsize,
            pixel_bytes=self.pixel_bytes,
            temporal_ratio=self.config.arch_config.temporal_ratio,
            rates=self.machine.rates(self.engine.kind(self.dtype, self.device)),
            link=self.machine.link,
        )

    def single(self) -> DecodePlan:
        """Every rank decodes everything."""
        patches = self._patches((1, 1), 1, shared=False, ranks=1)
        return self._planned("single", patches, patches.grid)

    def patches(self) -> Iterator[DecodePlan]:
        """The exact ways to share: every grid, head for oneself or shared, images dealt first or not."""
        most = min(self.shape[0], self.ranks)
        for groups in [count for count in range(1, most + 1) if count == most or self.ranks % count == 0]:
            for grid in plan.grids(self.lat_size, self.ranks // groups):
                for shared in (False, True):
                    if shared and (groups > 1 or not self._can_share_head):
                        continue
                    patches = self._patches(grid, groups, shared=shared, ranks=self.ranks)
                    yield self._planned("patch", patches, grid)

    @property
    def _can_share_head(self) -> bool:
        return self.engine.shares_head and 1 < self.ranks <= self.lat_size[0]

    def tiled(self, budget_bytes: int) -> DecodePlan:
        """The overlapping tiles that the config asks for, as many at once as fit."""
        config, ratio = self.config, self.config.arch_config.spatial_ratio
        tile_min = (config.tile_sample_min_height // ratio, config.tile_sample_min_width // ratio)
        stride = (config.tile_sample_stride_height // ratio, config.tile_sample_stride_width // ratio)
        tiles = plan.plan_tiles(self.lat_size, tile_min, stride)
        batch = min(_MOST_TILES_AT_ONCE, len(tiles.tiles))
        found = self._planned("tiled", replace(tiles, batch=batch), tiles.grid)
        while batch > 1 and found.needed_bytes > budget_bytes:
            batch //= 2
            found = self._planned("tiled", replace(tiles, batch=batch), tiles.grid)
        return found

    def plan(self, mode: str | None, budget_bytes: int) -> DecodePlan:
        """``mode``: what a method's name asks for, None to do as configured.

        Raises:
            ValueError: what was asked for needs more than ``budget_bytes``, or nothing fits.
        """
        reason = "as configured" if mode is None else "the method called"
        if mode is None:
            alone = "tiled" if self.config.use_tiling else "single"
            mode = self.config.exact_mode if self.config.use_parallel_decode else alone
        if mode == "auto":
            return self._auto(budget_bytes)
        if mode == "tiled":
            found = self.tiled(budget_bytes)
        else:
            found = self.single() if mode == "single" else self._best(list(self.patches()), budget_bytes)
        self._refuse_over_budget(found, budget_bytes)
        return replace(found, choice=replace(found.choice, reason=reason))

    def _auto(self, budget_bytes: int) -> DecodePlan:
        """The exact plan that is predicted to be fastest among those that fit; tiles only where none does."""
        single = self.single()
        exact = [single, *(self.patches() if self.ranks > 1 else ())]
        best = self._best(exact, budget_bytes)
        if best.needed_bytes > budget_bytes:
            tiled = self.tiled(budget_bytes)
            self._refuse_over_budget(tiled, budget_bytes)
            needed, allowed = best.needed_bytes / GIB, budget_bytes / GIB
            reason = f"an exact decode needs {needed:.3g} GiB a rank, {allowed:.3g} are allowed"
            return replace(tiled, choice=replace(tiled.choice, reason=reason))
        reason = "there is one rank"
        if self.ranks > 1:
            reason = f"predicted {best.choice.ms:.3g} ms, {single.choice.ms:.3g} ms for one rank alone"
        return replace(best, choice=replace(best.choice, reason=reason))

    @staticmethod
    def _best(plans: Sequence[DecodePlan], budget_bytes: int) -> DecodePlan:
        """The fastest that fits; earlier ones, which are simpler, where the gain is small. The least, if none fits."""
        fitting = [found for found in plans if found.needed_bytes <= budget_bytes]
        if not fitting:
            return min(plans, key=lambda found: found.needed_bytes)
        best = fitting[0]
        for found in fitting[1:]:
            simpler = (found.choice.mode, found.choice.head) == (best.choice.mode, best.choice.head)
            if found.choice.ms < best.choice.ms * (1 if simpler else _WORTHWHILE):
                best = found
        return best

    def _patches(self, grid: tuple[int, int], groups: int, *, shared: bool, ranks: int) -> PatchPlan:
        return plan.plan_patches(
            self.engine.decoder_stages,
            self.lat_size,
            self.lat_size,
            grid,
            ranks,
            batch=self.shape[0],
            groups=groups,
            head_rows=plan.even_split(self.lat_size[0], ranks) if shared else None,
        )

    def _planned(self, mode: str, layout: PatchPlan | TilePlan, grid: tuple[int, int]) -> DecodePlan:
        if isinstance(layout, TilePlan):
            ms, needed, kept = self.cost.tiled_ms(layout, self.ranks), self._tiled_bytes(layout), 0
            choice = DecodeChoice(mode, self.ranks, grid, "")
        else:
            ms, needed, kept = (
                self.cost.patch_ms(layout, self.ranks),
                self._patch_bytes(layout),
                self._kept_bytes(layout),
            )
            head = "own" if layout.head_rows is None else "shared"
            choice = DecodeChoice(mode, self.ranks, grid, "", head, layout.groups)
        return DecodePlan(replace(choice, ms=round(ms, 3), gib=round(needed / GIB, 6)), layout, needed, kept)

    def _patch_bytes(self, patches: PatchPlan) -> int:
        images = max(span.size for span in patches.images)
        work = max(self._window_bytes(trace, images) for trace in patches.traces)
        return work + self._kept_bytes(patches) + 2 * self._result_values * self.pixel_bytes

    def _kept_bytes(self, patches: PatchPlan) -> int:
        """What the ranks exchange, on one of them, its own part and everyone's: pixels, and where they share the head
        keys and values, stream and the attention's result."""
        if len(patches.traces) == 1:
            return 0
        images, rows, cols = patches.shard_size
        shard_px = images * self.config.arch_config.input_channels * rows * cols
        kept = (self.ranks + 1) * shard_px * self.pixel_bytes
        if patches.head_rows is not None:
            most = max(span.size for span in patches.head_rows)
            own = self.shape[0] * most * self.lat_size[1] * self.engine.attention_channels
            kept += (self.ranks + 1) * 4 * own * self.dtype.itemsize
        return kept

    def _tiled_bytes(self, tiles: TilePlan) -> int:
        """Tiles are gathered in the network's dtype and added up in fp32."""
        trace = plan.whole(self.engine.decoder_stages, *tiles.tile)
        work = self._window_bytes(trace, tiles.batch * self.shape[0])
        overlapping = sum(tile.area for tile in tiles.tiles) / (self.lat_size[0] * self.lat_size[1])
        return work + int(self._result_values * (2 * overlapping * self.dtype.itemsize + 8))

    def _window_bytes(self, trace: Sequence[Window], images: int) -> int:
        load = Load("decoder", trace, images)
        return self.engine.estimated_bytes(load, self.dtype, self.device, stream=self.shape[2] > 1)

    @property
    def _result_values(self) -> int:
        arch = self.config.arch_config
        area_px = arch.spatial_ratio**2 * self.lat_size[0] * self.lat_size[1]
        return self.shape[0] * arch.input_channels * arch.pixel_frames(self.shape[2]) * area_px

    def _refuse_over_budget(self, found: DecodePlan, budget_bytes: int) -> None:
        refuse_over_budget(f"{found.choice.mode} decode", self.shape, self.dtype, found.needed_bytes, budget_bytes)


@dataclass(frozen=True)
class EncodePlanner:
    """The plan for pixels of one ``shape`` [B, 3, F, H, W], on ``ranks`` of a ``machine``."""

    config: VAEConfig
    engine: Engine
    machine: Machine
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    ranks: int

    @property
    def lat_frames(self) -> int:
        return 1 + (self.shape[2] - 1) // self.config.arch_config.temporal_ratio

    @property
    def lat_size(self) -> tuple[int, int]:
        ratio = self.config.arch_config.spatial_ratio
        return self.shape[-2] // ratio, self.shape[-1] // ratio

    def patches(self, budget_bytes: int) -> PatchPlan:
        """One exact window for each rank; the grid whose busiest rank has least to do.

        Raises:
            ValueError: a window needs more than ``budget_bytes``.
        """
        stages, in_size = self.engine.encoder_stages, (self.shape[-2], self.shape[-1])
        rows = plan.even_split(self.lat_size[0], self.ranks) if self._head_pays() else None
        candidates = [
            plan.plan_patches(stages, in_size, self.lat_size, grid, self.ranks, batch=self.shape[0], head_rows=rows)
            for grid in plan.grids(self.lat_size, self.ranks)
        ]
        best = min(candidates, key=lambda patches: max(plan.local_work(stages, trace) for trace in patches.traces))
        refuse_over_budget("encode", self.shape, self.dtype, self._needed_bytes(best), budget_bytes)
        return best

    def _head_pays(self) -> bool:
        """Whether the ranks had better share the attention, and bring keys, values and its result together."""
        tokens, channels = self.lat_size[0] * self.lat_size[1], self.engine.feature_channels
        if not self.engine.shares_head or self.ranks == 1 or self.lat_size[0] < self.ranks:
            return False
        rates, link = self.machine.rates(self.engine.kind(self.dtype, self.device)), self.machine.link
        alone_ms = self.shape[0] * plan.attention_work(channels, tokens, tokens) / 1e9 * rates.attention_ms
        share_bytes = self.shape[0] * -(-self.lat_size[0] // self.ranks) * self.lat_size[1] * channels
        share_bytes *= self.dtype.itemsize
        gathers_ms = link.gather_ms(2 * share_bytes, self.ranks) + 2 * link.gather_ms(share_bytes, self.ranks)
        return alone_ms / self.ranks + gathers_ms < _WORTHWHILE * alone_ms

    def _needed_bytes(self, patches: PatchPlan) -> int:
        batch, stream = self.shape[0], self.shape[2] > 1
        work = max(
            self.engine.estimated_bytes(Load("encoder", trace, batch), self.dtype, self.device, stream=stream)
            for trace in patches.traces
        )
        features = batch * self.engine.feature_channels * self.lat_frames * self.lat_size[0] * self.lat_size[1]
        return work + 2 * features * self.dtype.itemsize


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
            f"{budget / GIB:.3g} GiB are allowed (memory_limit_gib, default: what is free); "
            "use more ranks, a smaller picture or batch, or parallel_decode_mode 'tiled' or 'auto'"
        )
