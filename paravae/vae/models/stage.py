"""A network's local steps as a list: what to run, and the geometry that planning needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from paravae.vae.models.blocks import Downsample, FrameCache, ResidualBlock, Upsample
from paravae.vae.plan import LocalStage, Window


@dataclass(frozen=True)
class Stage:
    """One local step: ``run(x, cache)`` on [B, C, T, H, W], or what a faster network hands on, with its geometry."""

    run: Callable[[Any, FrameCache | None], Any]
    geometry: LocalStage

    @staticmethod
    def of(layer: nn.Module) -> Stage:
        """The stage of a layer that states its own geometry."""
        assert isinstance(layer, ResidualBlock | Upsample | Downsample)
        return Stage(layer, layer.geometry)


def crop(x: Tensor, have: Window, want: Window) -> Tensor:
    """Cut ``want`` out of [..., H, W] that covers ``have``."""
    if have == want:
        return x
    rows = slice(want.rows.start - have.rows.start, want.rows.stop - have.rows.start)
    cols = slice(want.cols.start - have.cols.start, want.cols.stop - have.cols.start)
    return x[..., rows, cols]


def run_local(
    stages: Sequence[Stage],
    x: Any,
    trace: Sequence[Window],
    cache: FrameCache | None,
    crop: Callable[[Any, Window, Window], Any] = crop,
) -> Any:
    """Run local stages on the window ``trace[0]`` that ``x`` covers, giving exactly the window ``trace[-1]``.

    After every stage its spoilt edges, and all that no later stage needs, are cut away by ``crop(x, have, want)``.
    """
    for stage, fed, wanted in zip(stages, trace, trace[1:], strict=False):
        x = stage.run(x, cache)
        x = crop(x, stage.geometry.gives_window(fed), wanted)
    return x
