"""ParallelTiledVAE: plan -> each rank's own share -> one gather -> paste or blend. Nothing else.

Tensors are [B, C, T, H, W]: latents [B, z_dim, T, h, w], pixels [B, 3, F, 8 h, 8 w] with F = 4 T - 3 for the
published models. Every rank of the parallel group calls with the same tensors and gets the whole result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from paravae.configs import VAEConfig
from paravae.vae import plan
from paravae.vae.blend import cross_fade, paste
from paravae.vae.checks import FiniteCheck, check_half, check_latents, check_output_type, check_pixels
from paravae.vae.choice import DecodeChoice, DecodePlan, DecodePlanner, EncodePlanner, KeptPlans
from paravae.vae.comm import RankGroup
from paravae.vae.engines.base import Engine
from paravae.vae.memory import GIB, device_bytes
from paravae.vae.pixels import to_uint8
from paravae.vae.plan import PatchPlan, Span, TilePlan, Window
from paravae.vae.posterior import Posterior
from paravae.vae.share import Progress, decode_tiles, decode_window, encode_window, window_pieces

logger = logging.getLogger("paravae")

OnFrames = Callable[[Tensor], object]
"""Takes the next frames of a decode, [B, 3, f, 8 h, 8 w]: one, then as many as a latent frame gives each time."""


class ParallelTiledVAE(nn.Module):
    """A VAE whose decode and encode are shared by the ranks of a group.

    A subclass builds its networks and hands an engine that runs them to ``use_engine``.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.last_choice: DecodeChoice | None = None
        self._engine: Engine | None = None
        self._group: RankGroup | None = None
        self._budgets: dict[int, int] = {}  # this rank's own -> the least of the group
        self._decode_plans: KeptPlans[DecodePlan] = KeptPlans()
        self._encode_plans: KeptPlans[PatchPlan] = KeptPlans()
        self._announced: set[DecodeChoice] = set()

    # ---------------------------------------------------------------------------------------------- set-up

    def use_engine(self, engine: Engine) -> None:
        """Decode and encode with ``engine`` from now on."""
        self._engine = engine
        self._decode_plans, self._encode_plans = KeptPlans(), KeptPlans()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError(f"{type(self).__name__} has no engine: its __init__ must call use_engine")
        return self._engine

    def set_parallel_group(self, process_group: torch.distributed.ProcessGroup) -> None:
        """Share decodes among the ranks of ``process_group``; the default is the world. All its ranks call this."""
        self._group = RankGroup.of(process_group)
        self._budgets.clear()

    @property
    def parallel_group(self) -> RankGroup:
        """The ranks that share a decode: the group that was set, or the world once torch.distributed is up."""
        if self._group is None:
            world = RankGroup.world()
            if world.size == 1:
                return world
            self._group = world
        return self._group

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # ---------------------------------------------------------------------------------------------- decode

    @overload
    def decode(
        self, latents: Tensor, *, output_type: str = ..., on_progress: Progress | None = ..., on_frames: None = None
    ) -> Tensor: ...

    @overload
    def decode(
        self, latents: Tensor, *, output_type: str = ..., on_progress: Progress | None = ..., on_frames: OnFrames
    ) -> None: ...

    def decode(
        self,
        latents: Tensor,
        *,
        output_type: str = "float",
        on_progress: Progress | None = None,
        on_frames: OnFrames | None = None,
    ) -> Tensor | None:
        """Latents [B, z_dim, T, h, w], denormalised -> pixels [B, 3, F, 8 h, 8 w], on every rank.

        ``output_type``: "float", in the weights' dtype and [-1, 1]; or "uint8", 0..255, converted before it travels.
        ``on_frames``: takes the frames as they are ready instead, so that memory does not grow with T, and nothing
        is returned (tiled: all are decoded first).

        Raises:
            ValueError: the latents do not fit the model, hold NaN or Inf, or would need too much memory.
            RankError: another rank failed, or was given something else. No rank is left waiting.
        """
        ranks = self._ranks(self.config.use_parallel_decode)
        if on_frames is None:
            return self._decode(latents, None, ranks, output_type, on_progress)
        self._stream(latents, ranks, output_type, on_progress, on_frames)
        return None

    def tiled_decode(
        self, latents: Tensor, *, output_type: str = "float", on_progress: Progress | None = None
    ) -> Tensor:
        """Decode alone, in overlapping tiles: approximate, with little memory."""
        return self._decode(latents, "tiled", RankGroup.alone(), output_type, on_progress)

    def parallel_tiled_decode(
        self, latents: Tensor, *, output_type: str = "float", on_progress: Progress | None = None
    ) -> Tensor:
        """``tiled_decode`` with the tiles dealt to the ranks: the same result to the bit."""
        return self._decode(latents, "tiled", self._ranks(True), output_type, on_progress)

    def parallel_patch_decode(
        self, latents: Tensor, *, output_type: str = "float", on_progress: Progress | None = None
    ) -> Tensor:
        """Decode one window a rank, exactly: what one rank alone would give, but for rounding."""
        return self._decode(latents, "patch", self._ranks(True), output_type, on_progress)

    @torch.no_grad()
    def _decode(
        self, latents: Tensor, mode: str | None, ranks: RankGroup, output_type: str, on_progress: Progress | None
    ) -> Tensor:
        asked = self._request(latents, mode, output_type)
        budget = self._memory_budget(ranks)
        as_uint8, parts = output_type == "uint8", (self.engine, self.config.arch_config)
        with ranks.agreement(asked):
            decode_plan, finite = self._check_and_plan(latents, mode, ranks, output_type, budget)
            layout = decode_plan.layout
            if isinstance(layout, TilePlan):
                shares = plan.even_split(len(layout.tiles), ranks.size)
                shard = decode_tiles(*parts, latents, layout, shares[ranks.rank], shares[0].size, on_progress)
            else:
                trace = _own_trace(layout, ranks)
                shard = decode_window(*parts, latents, trace, layout.shard_size, as_uint8, on_progress)
            finite.raise_if_not()
        self._announce(decode_plan.choice)
        if isinstance(layout, PatchPlan):
            return _together(shard, layout, ranks, *self._picture_size(latents))
        picture = self._blend_tiles(ranks.all_gather(shard), layout, shares, *self._picture_size(latents))
        return to_uint8(picture) if as_uint8 else picture.to(latents.dtype)

    @torch.no_grad()
    def _stream(
        self,
        latents: Tensor,
        ranks: RankGroup,
        output_type: str,
        on_progress: Progress | None,
        on_frames: OnFrames,
    ) -> None:
        """Decode a latent frame at a time, all ranks in step: each is gathered before the next begins."""
        asked = f"{self._request(latents, None, output_type)}, in a stream"
        budget = self._memory_budget(ranks)
        with ranks.agreement(asked):
            decode_plan, finite = self._check_and_plan(latents, None, ranks, output_type, budget, stream=True)
        layout = decode_plan.layout
        if isinstance(layout, TilePlan):
            self._hand_out(self._decode(latents, None, ranks, output_type, on_progress), ranks, on_frames)
            return
        self._announce(decode_plan.choice)
        trace, as_uint8 = _own_trace(layout, ranks), output_type == "uint8"
        pieces = window_pieces(self.engine, self.config.arch_config, latents, trace, layout.shard_size, as_uint8)
        for step in range(1, latents.shape[2] + 1):
            with ranks.agreement(f"latent frame {step} of {asked}"):
                shard = next(pieces)
                if step == 1:
                    finite.raise_if_not()
            frames = _together(shard, layout, ranks, *self._picture_size(latents))
            with ranks.agreement(f"frames of latent frame {step} taken"):
                on_frames(frames)
                if on_progress:
                    on_progress(step, latents.shape[2])

    def _picture_size(self, latents: Tensor) -> tuple[int, int]:
        ratio = self.config.arch_config.spatial_ratio
        return ratio * latents.shape[-2], ratio * latents.shape[-1]

    def _hand_out(self, pixels: Tensor, ranks: RankGroup, on_frames: OnFrames) -> None:
        """Finished pixels, in the pieces that a stream would have given."""
        with ranks.agreement("frames taken"):
            on_frames(pixels[:, :, :1])
            for frames in pixels[:, :, 1:].split(self.config.arch_config.temporal_ratio, dim=2):
                if frames.shape[2]:
                    on_frames(frames)

    def _check_and_plan(
        self,
        latents: Tensor,
        mode: str | None,
        ranks: RankGroup,
        output_type: str,
        budget: int,
        *,
        stream: bool = False,
    ) -> tuple[DecodePlan, FiniteCheck]:
        """``stream``: the result is not held as a whole, but a latent frame's part at a time."""
        check_half("decoder", self.config.load_decoder)
        check_output_type(output_type)
        weight = next(self.parameters())
        check_latents(latents, self.config.arch_config, weight.dtype, weight.device)
        finite = FiniteCheck("latents", latents)
        batch, channels, lat_frames, *lat_size = latents.shape
        shape = (batch, channels, min(lat_frames, 2) if stream else lat_frames, *lat_size)

        def make() -> DecodePlan:
            head_work = self.engine.head_work(*lat_size)
            planner = DecodePlanner(self.config, self.engine.decoder_stages, head_work, shape, latents.dtype)
            return planner.plan(mode, ranks.size, budget)

        key = (shape, latents.dtype, mode, ranks.size, budget)
        return self._decode_plans.get(self.config, key, make), finite

    def _blend_tiles(self, shards: Tensor, tiles: TilePlan, shares: Sequence[Span], height: int, width: int) -> Tensor:
        in_order = (shards[rank, slot] for rank, share in enumerate(shares) for slot in range(share.size))
        ratio = self.config.arch_config.spatial_ratio
        return cross_fade(in_order, [tile.scaled(ratio) for tile in tiles.tiles], height, width)

    # ---------------------------------------------------------------------------------------------- encode

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, on_progress: Progress | None = None) -> Posterior:
        """Pixels [B, 3, F, H, W] in [-1, 1], H and W multiples of 8, F = 4 k + 1 -> posterior of the latents.

        Exact on any number of ranks: each encodes a window up to the attention, the features are gathered,
        and every rank finishes the whole: by multiply-adds 12 % of the work at 512x512, 21 % at 1024x1024.

        Raises: as ``decode`` does.
        """
        ranks = self._ranks(self.config.use_parallel_decode and self.config.use_parallel_encode)
        asked = f"encode of {_shape_of(pixels)}"
        budget = self._memory_budget(ranks)
        with ranks.agreement(asked):
            check_half("encoder", self.config.load_encoder)
            weight = next(self.parameters())
            check_pixels(pixels, self.config.arch_config, weight.dtype, weight.device)
            finite = FiniteCheck("pixels", pixels)
            stages, channels = self.engine.encoder_stages, self.engine.feature_channels
            planner = EncodePlanner(self.config, stages, channels, pixels.shape, pixels.dtype)
            key = (pixels.shape, pixels.dtype, ranks.size, budget)
            patches = self._encode_plans.get(self.config, key, lambda: planner.patches(ranks.size, budget))
            shard = encode_window(self.engine, pixels, planner.lat_frames, patches, ranks.rank, on_progress)
            finite.raise_if_not()
        features = _together(shard, patches, ranks, *planner.lat_size)
        with ranks.agreement(asked):
            return Posterior.from_moments(self.engine.encode_features(features))

    # -------------------------------------------------------------------------------------------- planning

    def _ranks(self, parallel: bool) -> RankGroup:
        return self.parallel_group if parallel else RankGroup.alone()

    def _request(self, latents: Tensor, mode: str | None, output_type: str) -> str:
        """What a decode is asked for, in words that must be the same on every rank."""
        config = self.config
        tile = f"{config.tile_sample_min_height} x {config.tile_sample_min_width}"
        stride = f"{config.tile_sample_stride_height} x {config.tile_sample_stride_width}"
        what = f"{mode or config.exact_mode} decode of {_shape_of(latents)} as {output_type}"
        return f"{what}, tiles {tile} px every {stride}"

    def _memory_budget(self, ranks: RankGroup) -> int:
        """Bytes that a decode may need on any rank: the least of what each has, or has been limited to."""
        limit = self.config.memory_limit_gib
        own = device_bytes(self.device) if limit is None else int(limit * GIB)
        if ranks.size == 1:
            return own
        if own not in self._budgets:
            self._budgets[own] = ranks.minimum("memory budget in bytes", own)
        return self._budgets[own]

    def _announce(self, choice: DecodeChoice) -> None:
        self.last_choice = choice
        if choice not in self._announced:
            self._announced.add(choice)
            logger.info("decode: %s: %s", choice.how, choice.reason)


def _own_trace(patches: PatchPlan, ranks: RankGroup) -> tuple[Window, ...]:
    """This rank's window of an exact decode; where all decode alone there is one for all."""
    return patches.traces[ranks.rank if len(patches.traces) > 1 else 0]


def _together(shard: Tensor, patches: PatchPlan, ranks: RankGroup, height: int, width: int) -> Tensor:
    """The whole, from every rank's shard of it; a lone window is the whole, and nothing travels."""
    if len(patches.traces) == 1:
        return shard
    return paste(ranks.all_gather(shard), patches.outputs, height, width)


def _shape_of(value: object) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
