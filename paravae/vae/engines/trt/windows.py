"""Which window a local part is fed, and what it gives: integers. See ``parts.Part``.

A part runs its window as if it were a whole picture, without cutting between its stages. What stands in the window
that ``plan.trace_window`` names is enough for the output it owes, but for one thing: stages that halve must start
where those of the whole picture start, so a window of pixels grows outwards to whole latents.
"""

from __future__ import annotations

from collections.abc import Sequence

from paravae.vae.plan import Span, Stages, Window


def window_fed(stages: Stages, trace: Sequence[Window]) -> Window:
    """The window that the part of ``stages`` is fed for the output ``trace[-1]``."""
    return Window(*(_aligned(span, _halvings(stages)) for span in (trace[0].rows, trace[0].cols)))


def window_given(stages: Stages, fed: Window) -> Window:
    """The window of the whole output that the part gives, spoilt edges included, when it is fed ``fed``."""
    for stage in stages:
        fed = stage.gives_window(fed)
    return fed


def _halvings(stages: Stages) -> int:
    return 2 ** sum(stage.resize == "down" for stage in stages)


def _aligned(span: Span, unit: int) -> Span:
    return Span(span.start // unit * unit, -(-span.stop // unit) * unit)
