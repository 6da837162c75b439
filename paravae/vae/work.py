"""One decode or encode as a rank does it: its own share, the gather, and what the whole is put together from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from paravae.vae import plan
from paravae.vae.blend import cross_fade, paste
from paravae.vae.checks import FiniteCheck
from paravae.vae.choice import DecodePlan
from paravae.vae.comm import GatherTo
from paravae.vae.engines.base import Load
from paravae.vae.pixels import to_uint8
from paravae.vae.plan import PatchPlan, TilePlan
from paravae.vae.share import Progress, Sharer, own_place

OnFrames = Callable[[Tensor], object]
"""Takes the next frames of a decode, [B, 3, f, 8 h, 8 w]: one, then as many as a latent frame gives each time."""


@dataclass(frozen=True)
class Decode:
    """A decode that has been planned. ``finite``: looks at the latents, once work has been queued."""

    sharer: Sharer
    planned: DecodePlan
    latents: Tensor
    finite: FiniteCheck
    as_uint8: bool
    gather_to: GatherTo

    def whole(self, told: Progress | None) -> Tensor | None:
        """All pixels, [B, 3, F, 8 h, 8 w], on the ranks that get them."""
        step, lat_frames = self.sharer.step, self.latents.shape[2]
        if lat_frames == 1:
            picture = self._recorded()
            self.finite.raise_if_not()
            if told and self._works:
                told(1, 1)
            return picture if self._receives else None
        step.agree()
        if isinstance(self.planned.layout, TilePlan):
            picture = self._tiled(self.planned.layout, self.latents, told)
            self.finite.raise_if_not()
            return picture if self._receives else None
        film: Tensor | None = None
        first = 0
        for piece in self._pieces(self.planned.layout, told):
            if not self._receives:
                continue
            if film is None:
                frames = self.sharer.arch.pixel_frames(lat_frames)
                film = piece.new_empty((*piece.shape[:2], frames, *piece.shape[3:]))
            film[:, :, first : first + piece.shape[2]] = piece
            first += piece.shape[2]
        return film

    def stream(self, on_frames: OnFrames, told: Progress | None) -> None:
        """Hand out the frames as they are ready, all ranks in step: each is gathered before the next begins."""
        layout = self.planned.layout
        if isinstance(layout, TilePlan):
            film = self.whole(told)
            pieces = iter(() if film is None else self._cut(film))
        else:
            self.sharer.step.agree()
            pieces = self._pieces(layout, told)
        for piece in pieces:
            if self._receives:
                self.sharer.step.group.settle(piece)
                on_frames(piece)

    def _cut(self, film: Tensor) -> Iterator[Tensor]:
        """Finished pixels, in the pieces that a stream would have given."""
        yield film[:, :, :1]
        if film.shape[2] > 1:
            yield from film[:, :, 1:].split(self.sharer.arch.temporal_ratio, dim=2)

    @property
    def _receives(self) -> bool:
        return self.gather_to in ("all", self.sharer.step.group.rank)

    @property
    def _works(self) -> bool:
        layout, group = self.planned.layout, self.sharer.step.group
        if isinstance(layout, TilePlan):
            return layout.shares(group.size)[group.rank].size > 0
        return layout.outputs[own_place(layout, group)].area > 0

    def _recorded(self) -> Tensor:
        """An image, by way of what the engine may have recorded."""
        layout, group, stages = self.planned.layout, self.sharer.step.group, self.sharer.engine.decoder_stages
        key: tuple[object, ...] = (self.planned.choice, group, self.as_uint8, self.gather_to)
        if isinstance(layout, TilePlan):
            key, trace, images = (*key, layout.tile), plan.whole(stages, *layout.tile), layout.batch
            frame = layout.tile
            images *= self.latents.shape[0]
            run = self._tiled_image
        else:
            place = own_place(layout, group)
            trace, images = layout.traces[place], layout.images[place].size
            frame = (self.latents.shape[-2], self.latents.shape[-1])
            run = self._patched_image
        load = Load("decoder", trace, images, self.planned.kept_bytes, frame)
        return self.sharer.engine.call(load, key, run, self.latents, self.sharer.step.agree)

    def _patched_image(self, latents: Tensor) -> Tensor:
        layout = self.planned.layout
        assert isinstance(layout, PatchPlan)
        (shard,) = self.sharer.window_pieces(latents, layout, self.as_uint8)
        return self._pasted(shard, layout)

    def _tiled_image(self, latents: Tensor) -> Tensor:
        layout = self.planned.layout
        assert isinstance(layout, TilePlan)
        return self._tiled(layout, latents, None)

    def _tiled(self, tiles: TilePlan, latents: Tensor, told: Progress | None) -> Tensor:
        shards = self.sharer.gather(self.sharer.tiles(latents, tiles, told), self.gather_to)
        if shards is None:
            return latents.new_empty(0)
        shares = tiles.shares(self.sharer.step.group.size)
        in_order = (shards[rank, slot] for rank, share in enumerate(shares) for slot in range(share.size))
        ratio = self.sharer.arch.spatial_ratio
        height, width = self._picture_size
        picture = cross_fade(in_order, [tile.scaled(ratio) for tile in tiles.tiles], height, width)
        return to_uint8(picture) if self.as_uint8 else picture.to(latents.dtype)

    def _pieces(self, patches: PatchPlan, told: Progress | None) -> Iterator[Tensor]:
        """The pixels of the next latent frame, on the ranks that get them, else anything."""
        shards = self.sharer.window_pieces(self.latents, patches, self.as_uint8)
        for index, shard in enumerate(shards):
            if index == 0:
                self.finite.raise_if_not()
            if told and self._works:
                told(index + 1, self.latents.shape[2])
            yield self._pasted(shard, patches)

    def _pasted(self, shard: Tensor, patches: PatchPlan) -> Tensor:
        """The whole, from every rank's shard of it; a lone window is the whole, and nothing travels."""
        if len(patches.traces) == 1:
            return shard
        shards = self.sharer.gather(shard, self.gather_to)
        if shards is None:
            return shard.new_empty(0)
        return paste(shards, patches.outputs, patches.images, self.latents.shape[0], *self._picture_size)

    @property
    def _picture_size(self) -> tuple[int, int]:
        ratio = self.sharer.arch.spatial_ratio
        return ratio * self.latents.shape[-2], ratio * self.latents.shape[-1]


@dataclass(frozen=True)
class Encode:
    """An encode that has been planned."""

    sharer: Sharer
    patches: PatchPlan
    pixels: Tensor
    lat_frames: int

    def moments(self, told: Progress | None) -> Tensor:
        """Mean and log-variance, [B, 2 z, T, h, w], on every rank."""
        step, engine = self.sharer.step, self.sharer.engine
        if self.lat_frames > 1:
            step.agree()
            return self._moments(self.pixels, told)
        trace = self.patches.traces[own_place(self.patches, step.group)]
        key = (self.patches.grid, self.patches.head_rows, step.group)
        load = Load("encoder", trace, self.pixels.shape[0], lat_frame=self._lat_size)
        moments = engine.call(load, key, self._moments, self.pixels, step.agree)
        if told and trace[-1].area:
            told(1, 1)
        return moments

    def _moments(self, pixels: Tensor, told: Progress | None = None) -> Tensor:
        patches, engine = self.patches, self.sharer.engine
        alone = len(patches.traces) == 1 and patches.head_rows is None
        if alone and self.lat_frames == 1:
            return engine.encode(pixels)
        features = torch.cat(list(self.sharer.features(pixels, self.lat_frames, patches, told)), dim=2)
        if len(patches.traces) > 1:
            shards = self.sharer.gather(features)
            assert shards is not None
            features = paste(shards, patches.outputs, patches.images, pixels.shape[0], *self._lat_size)
        return engine.encode_features(features, self.sharer.head(engine.encoder_front, patches.head_rows, features))

    @property
    def _lat_size(self) -> tuple[int, int]:
        ratio = self.sharer.arch.spatial_ratio
        return self.pixels.shape[-2] // ratio, self.pixels.shape[-1] // ratio
