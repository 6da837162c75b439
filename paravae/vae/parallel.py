"""ParallelTiledVAE: plan -> each rank's own share -> gather -> paste or blend. Nothing else.

Tensors are [B, C, T, H, W]: latents [B, z_dim, T, h, w], pixels [B, 3, F, 8 h, 8 w] with F = 4 T - 3 for the
published models. Every rank of the parallel group calls with the same tensors and gets the whole result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from paravae.configs import VAEConfig
from paravae.vae.checks import FiniteCheck, check_gather_to, check_half, check_latents, check_output_type, check_pixels
from paravae.vae.choice import DecodeChoice, DecodePlan, DecodePlanner, EncodePlanner, KeptPlans
from paravae.vae.comm import GatherTo, RankGroup
from paravae.vae.cost import Machine, machine_of
from paravae.vae.engines.base import Engine
from paravae.vae.memory import GIB, device_name, free_bytes
from paravae.vae.plan import PatchPlan
from paravae.vae.posterior import Posterior
from paravae.vae.share import Progress, Sharer
from paravae.vae.work import Decode, Encode, OnFrames

logger = logging.getLogger("paravae")


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
        self._machines: dict[tuple[RankGroup, str | None], Machine] = {}
        self._forget_plans()
        self._announced: set[DecodeChoice] = set()

    # ---------------------------------------------------------------------------------------------- set-up

    def use_engine(self, engine: Engine) -> None:
        """Decode and encode with ``engine`` from now on."""
        self._engine = engine
        self._forget_plans()

    def _forget_plans(self) -> None:
        """Those for one rank alone and those for many are kept apart, so that all ranks keep the same of the latter,
        whatever each of them does by itself."""
        self._decode_plans: tuple[KeptPlans[DecodePlan], ...] = (KeptPlans(), KeptPlans())
        self._encode_plans: tuple[KeptPlans[PatchPlan], ...] = (KeptPlans(), KeptPlans())

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError(f"{type(self).__name__} has no engine: its __init__ must call use_engine")
        return self._engine

    def set_parallel_group(self, process_group: torch.distributed.ProcessGroup) -> None:
        """Share decodes among the ranks of ``process_group``; the default is the world. All its ranks call this."""
        self._group = RankGroup.of(process_group)

    def warm_up(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Decode and encode a grey picture of each size, (width, height) in pixels, so that kernels are compiled and
        engines loaded before the first request. All ranks of the group call this.

        Raises: as ``decode`` and ``encode`` do.
        """
        arch = self.config.arch_config
        for width, height in sizes:
            pixels = torch.zeros(1, arch.input_channels, 1, height, width, dtype=self.dtype, device=self.device)
            if self.config.load_encoder:
                self.encode(pixels)
            if self.config.load_decoder:
                lat_size = (height // arch.spatial_ratio, width // arch.spatial_ratio)
                self.decode(pixels.new_zeros((1, arch.z_dim, 1, *lat_size)))

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
        self, latents: Tensor, *, output_type: str = ..., gather_to: GatherTo = ..., on_progress: Progress | None = ...
    ) -> Tensor: ...

    @overload
    def decode(
        self,
        latents: Tensor,
        *,
        output_type: str = ...,
        gather_to: GatherTo = ...,
        on_progress: Progress | None = ...,
        on_frames: OnFrames,
    ) -> None: ...

    def decode(
        self,
        latents: Tensor,
        *,
        output_type: str = "float",
        gather_to: GatherTo = "all",
        on_progress: Progress | None = None,
        on_frames: OnFrames | None = None,
    ) -> Tensor | None:
        """Latents [B, z_dim, T, h, w], denormalised -> pixels [B, 3, F, 8 h, 8 w].

        ``output_type``: "float", in the weights' dtype and [-1, 1]; or "uint8", 0..255, converted before it travels.
        ``gather_to``: "all" ranks get the result, or only that rank of the group, and the others None; where each
        decodes alone all have it in any case, and those others None all the same.
        ``on_frames``: takes the frames as they are ready instead, so that memory does not grow with T, and nothing
        is returned (tiled: all are decoded first).

        Shared by several GPUs, it returns once the result is there: so that no rank that is gone can leave the
        others with a GPU that waits for ever. Alone it returns once the work is queued, as PyTorch does.

        Raises:
            ValueError: the latents do not fit the model, hold NaN or Inf, or would need too much memory.
            RankError: another rank failed, is gone, or was given something else. No rank is left waiting.
        """
        ranks = self._ranks(self.config.use_parallel_decode)
        return self._decode(latents, None, ranks, output_type, gather_to, on_progress, on_frames)

    def tiled_decode(
        self, latents: Tensor, *, output_type: str = "float", on_progress: Progress | None = None
    ) -> Tensor:
        """Decode alone, in overlapping tiles: approximate, with little memory."""
        return self._decode(latents, "tiled", RankGroup.alone(), output_type, "all", on_progress)

    def parallel_tiled_decode(
        self,
        latents: Tensor,
        *,
        output_type: str = "float",
        gather_to: GatherTo = "all",
        on_progress: Progress | None = None,
    ) -> Tensor:
        """``tiled_decode`` with the tiles dealt to the ranks: the same result to the bit."""
        return self._decode(latents, "tiled", self._ranks(True), output_type, gather_to, on_progress)

    def parallel_patch_decode(
        self,
        latents: Tensor,
        *,
        output_type: str = "float",
        gather_to: GatherTo = "all",
        on_progress: Progress | None = None,
    ) -> Tensor:
        """Decode one window a rank, exactly: what one rank alone would give, but for rounding."""
        return self._decode(latents, "patch", self._ranks(True), output_type, gather_to, on_progress)

    @torch.no_grad()
    def _decode(
        self,
        latents: Tensor,
        mode: str | None,
        ranks: RankGroup,
        output_type: str,
        gather_to: GatherTo,
        on_progress: Progress | None,
        on_frames: OnFrames | None = None,
    ) -> Any:
        with ranks.in_step(self._request(latents, mode, output_type, gather_to, on_frames is not None)) as step:
            check_gather_to(gather_to, ranks.size)
            planned, finite = self._check_and_plan(latents, mode, ranks, output_type, stream=on_frames is not None)
            step.also(planned.choice.how)
            sharer = Sharer(self.engine, self.config.arch_config, step)
            work = Decode(sharer, planned, latents, finite, output_type == "uint8", gather_to)
            if on_frames is None:
                picture = work.whole(on_progress)
            else:
                picture = None
                work.stream(on_frames, on_progress)
            step.agree(last=True)
        self._announce(planned.choice)
        ranks.settle(latents)  # those that receive nothing too: their GPUs send, and wait for who receives
        return picture

    def _check_and_plan(
        self, latents: Tensor, mode: str | None, ranks: RankGroup, output_type: str, *, stream: bool
    ) -> tuple[DecodePlan, FiniteCheck]:
        """``stream``: the result is not held as a whole, but a latent frame's part at a time."""
        check_half("decoder", self.config.load_decoder)
        check_output_type(output_type)
        weight = next(self.parameters())
        check_latents(latents, self.config.arch_config, weight.dtype, weight.device)
        finite = FiniteCheck("latents", latents)
        batch, channels, lat_frames, *lat_size = latents.shape
        shape = (batch, channels, min(lat_frames, 2) if stream else lat_frames, *lat_size)
        pixel_bytes = 1 if output_type == "uint8" else latents.element_size()

        def make() -> DecodePlan:
            planner = DecodePlanner(
                config=self.config,
                engine=self.engine,
                machine=self._machine(ranks),
                shape=shape,
                dtype=latents.dtype,
                device=latents.device,
                ranks=ranks.size,
                pixel_bytes=pixel_bytes,
            )
            return planner.plan(mode, self._memory_budget(ranks))

        key = (shape, latents.dtype, pixel_bytes, mode, ranks)
        kept = self._decode_plans[ranks.size > 1]
        return kept.get(self.config, key, make), finite

    # ---------------------------------------------------------------------------------------------- encode

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, on_progress: Progress | None = None) -> Posterior:
        """Pixels [B, 3, F, H, W] in [-1, 1], H and W multiples of 8, F = 4 k + 1 -> posterior of the latents.

        Exact on any number of ranks: each encodes a window up to the attention, the features are gathered, the
        attention is shared where it is large, and every rank finishes the whole.

        Raises: as ``decode`` does.
        """
        ranks = self._ranks(self.config.use_parallel_decode and self.config.use_parallel_encode)
        with ranks.in_step(f"encode of {_shape_of(pixels)}") as step:
            check_half("encoder", self.config.load_encoder)
            weight = next(self.parameters())
            check_pixels(pixels, self.config.arch_config, weight.dtype, weight.device)
            finite = FiniteCheck("pixels", pixels)
            planner = EncodePlanner(
                config=self.config,
                engine=self.engine,
                machine=self._machine(ranks),
                shape=tuple(pixels.shape),
                dtype=pixels.dtype,
                device=pixels.device,
                ranks=ranks.size,
            )
            kept = self._encode_plans[ranks.size > 1]
            key = (planner.shape, planner.dtype, ranks)
            patches = kept.get(self.config, key, lambda: planner.patches(self._memory_budget(ranks)))
            work = Encode(Sharer(self.engine, self.config.arch_config, step), patches, pixels, planner.lat_frames)
            moments = work.moments(on_progress)
            finite.raise_if_not()
            step.agree(last=True)
        ranks.settle(moments)
        return Posterior.from_moments(moments)

    # -------------------------------------------------------------------------------------------- planning

    def _ranks(self, parallel: bool) -> RankGroup:
        return self.parallel_group if parallel else RankGroup.alone()

    def _request(self, latents: Tensor, mode: str | None, output_type: str, gather_to: GatherTo, stream: bool) -> str:
        """What a decode is asked for, in words that must be the same on every rank."""
        config = self.config
        tile = f"{config.tile_sample_min_height} x {config.tile_sample_min_width}"
        stride = f"{config.tile_sample_stride_height} x {config.tile_sample_stride_width}"
        what = f"{mode or config.exact_mode} decode of {_shape_of(latents)} as {output_type}, to {gather_to}"
        return f"{what}, tiles {tile} px every {stride}{', in a stream' if stream else ''}"

    def _memory_budget(self, ranks: RankGroup) -> int:
        """Bytes that a decode may need on any rank: the least of what each has free, or has been limited to."""
        limit = self.config.memory_limit_gib
        own = free_bytes(self.device) if limit is None else int(limit * GIB)
        return ranks.minimum("memory budget in bytes", own)

    def _machine(self, ranks: RankGroup) -> Machine:
        """What predictions go by: rank 0's constants, so that all ranks come to the same plan."""
        table = self.config.cost_table
        if (ranks, table) not in self._machines:
            own = machine_of(table, device_name(self.device))
            self._machines[ranks, table] = Machine.from_json(ranks.first("cost table", own.to_json()))
        return self._machines[ranks, table]

    def _announce(self, choice: DecodeChoice) -> None:
        self.last_choice = choice
        if choice not in self._announced:
            self._announced.add(choice)
            logger.info("decode: %s: %s", choice.how, choice.reason)


def _shape_of(value: object) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
