"""Which engines a call needs: integers only."""

from __future__ import annotations

from paravae.vae.engines.base import Load
from paravae.vae.engines.trt.parts import Part
from paravae.vae.engines.trt.windows import window_fed
from paravae.vae.plan import Stages, whole

Need = tuple[Part, tuple[int, int]]
"""A part, and the height and width of what it is to take."""


def needs_of(load: Load, decoder_stages: Stages, encoder_stages: Stages) -> list[list[Need]]:
    """The ways to run ``load``, each as what it needs, the better first. A rank without work needs nothing, but that
    each runs the encoder's head for itself."""
    decodes, (height, width) = load.half == "decoder", load.lat_frame
    stages = decoder_stages if decodes else encoder_stages
    head: Need = ("decoder_head" if decodes else "encoder_head", (height, width))
    if not load.trace[-1].area:
        return [[] if decodes else [head]]
    fed = window_fed(stages, load.trace)
    in_parts = [head, ("decoder_tail" if decodes else "encoder_body", (fed.rows.size, fed.cols.size))]
    covered = 1 if decodes else 2 ** sum(stage.resize == "down" for stage in stages)  # pixels, if it is given these
    size = (covered * height, covered * width)
    is_whole = tuple(load.trace) == whole(stages, *size)
    return [[(load.half, size)], in_parts] if is_whole else [in_parts]
