"""One rank's share of a decode or encode: its window or tiles, through the engine, into a shard of the common shape.

Every rank's shard has one shape, so that one gather brings them together; a smaller window fills its shard from the
top left, and a rank without work hands in zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from paravae.configs import VAEArchConfig
from paravae.vae import plan
from paravae.vae.comm import GatherTo, RankGroup, Step
from paravae.vae.engines.base import Engine, HeadShare
from paravae.vae.plan import PatchPlan, Span, Stages, TilePlan, Window

Progress = Callable[[int, int], None]
"""Told (steps done, steps in all) of this rank's share after each step: a latent frame of its window or tiles."""


@dataclass(frozen=True)
class Sharer:
    """What this rank needs for its share of any decode."""

    engine: Engine
    arch: VAEArchConfig
    step: Step

    def window_pieces(self, latents: Tensor, patches: PatchPlan, as_uint8: bool) -> Iterator[Tensor]:
        """The pixels of this rank's window, a latent frame at a time: [images, 3, f, rows, cols] of the common size."""
        place = own_place(patches, self.step.group)
        trace, images = patches.traces[place], patches.images[place]
        head = self.head(self.engine.decoder_front, patches.head_rows, latents)
        own = latents if head else latents[images.start : images.stop]  # a head is shared by those without a window too
        works = trace[-1].area > 0
        pieces = self.engine.decode(own, trace, as_uint8=as_uint8, head=head) if works or head else iter(())
        size = (images.size, trace[-1].rows.size, trace[-1].cols.size)
        for index in range(latents.shape[2]):
            piece = next(pieces, None)
            if size == patches.shard_size:
                assert piece is not None
                yield piece
                continue
            frames = self.arch.temporal_ratio if index else 1
            count, *common = patches.shard_size
            dtype = torch.uint8 if as_uint8 else latents.dtype
            shard = latents.new_zeros((count, self.arch.input_channels, frames, *common), dtype=dtype)
            if works:
                assert piece is not None
                shard[: images.size, ..., : size[1], : size[2]] = piece
            yield shard

    def tiles(self, latents: Tensor, tiles: TilePlan, told: Progress | None) -> Tensor:
        """This rank's tiles, each as if it were the whole picture: [slots, B, 3, F, rows, cols].

        They are decoded ``tiles.batch`` at a time; where they do not come out even the last are decoded twice, so that
        the engine meets one shape only, and computes the same whichever rank has a tile.
        """
        shares = tiles.shares(self.step.group.size)
        own = tiles.tiles[shares[self.step.group.rank].start : shares[self.step.group.rank].stop]
        trace = plan.whole(self.engine.decoder_stages, *tiles.tile)
        batch, lat_frames = latents.shape[0], latents.shape[2]
        frames, size = self.arch.pixel_frames(lat_frames), (trace[-1].rows.size, trace[-1].cols.size)
        shard = latents.new_zeros((shares[0].size, batch, self.arch.input_channels, frames, *size))
        for start in range(0, len(own), tiles.batch):
            some = own[start : start + tiles.batch]
            filled = [*some, *[some[-1]] * (tiles.batch - len(some))]
            cut = torch.cat([latents[..., t.rows.start : t.rows.stop, t.cols.start : t.cols.stop] for t in filled])
            first = 0
            for index, piece in enumerate(self.engine.decode(cut, trace), start=1):
                place = shard[start : start + len(some), :, :, first : first + piece.shape[2]]
                place.copy_(piece.unflatten(0, (tiles.batch, batch))[: len(some)])
                first += piece.shape[2]
                if told:
                    told(start * lat_frames + index * len(some), len(own) * lat_frames)
        return shard

    def gather(self, shard: Tensor, to: GatherTo = "all") -> Tensor | None:
        """Every rank's shard, [ranks, ...], once all ranks have come as far; None on a rank that does not receive."""
        group, shard = self.step.group, shard.contiguous()
        if group.size == 1:
            return shard[None]
        gathered = shard.new_empty((group.size, *shard.shape)) if to in ("all", group.rank) else None

        def collect() -> None:
            group.gather_into(gathered, shard, to)

        if not self.engine.repeats(collect):
            self.step.agree()
            collect()
        return gathered

    def head(self, front: Stages, rows: Sequence[Span] | None, value: Tensor) -> HeadShare | None:
        """This rank's rows of a head that the ranks share; ``rows``: by rank, None if each runs it for itself."""
        if rows is None:
            return None
        height, width = value.shape[-2:]
        own = Window(rows[self.step.group.rank], Span(0, width))
        return HeadShare(plan.trace_window(front, own, height, width), partial(self._rows_together, rows))

    def _rows_together(self, rows: Sequence[Span], part: Tensor, axis: int) -> Tensor:
        """The whole, of every rank's rows along ``axis``."""
        most = max(span.size for span in rows)
        part = part.movedim(axis, 0)
        if part.shape[0] < most:
            padded = part.new_zeros((most, *part.shape[1:]))
            padded[: part.shape[0]] = part
            part = padded
        gathered = self.gather(part)
        assert gathered is not None
        if all(span.size == most for span in rows):
            together = gathered.flatten(0, 1)
        else:
            together = torch.cat([shard[: span.size] for shard, span in zip(gathered, rows, strict=True)])
        return together.movedim(0, axis).contiguous()

    def features(
        self, pixels: Tensor, lat_frames: int, patches: PatchPlan, told: Progress | None = None
    ) -> Iterator[Tensor]:
        """Features of this rank's window, a latent frame at a time: [B, C, 1, rows, cols] of the common size."""
        trace = patches.traces[own_place(patches, self.step.group)]
        pieces = self.engine.encode_window(pixels, trace) if trace[-1].area else iter(())
        size = (trace[-1].rows.size, trace[-1].cols.size)
        for index in range(lat_frames):
            piece = next(pieces, None)
            if piece is not None and told:
                told(index + 1, lat_frames)
            if piece is None or size != patches.shard_size[1:]:
                shape = (pixels.shape[0], self.engine.feature_channels, 1, *patches.shard_size[1:])
                shard = pixels.new_zeros(shape)
                if piece is not None:
                    shard[..., : size[0], : size[1]] = piece
                piece = shard
            yield piece


def own_place(patches: PatchPlan, group: RankGroup) -> int:
    """Which of the plan's windows is this rank's: a lone window is everyone's."""
    return group.rank if len(patches.traces) > 1 else 0
