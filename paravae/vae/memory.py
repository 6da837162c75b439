"""What a decode or encode will need, and what a device has, in bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from paravae.vae.plan import Stages, Window, peak_elements

GIB = 2**30


def estimated_bytes(stages: Stages, trace: Sequence[Window], frames: int, dtype: torch.dtype, batch: int) -> int:
    """Peak over the weights of running ``stages`` along ``trace`` eagerly, an estimate on the safe side.

    At the largest activation there live at once: its input, output and shortcut in ``dtype``, and the norm's
    copies in at least fp32. A stream of several latent frames runs ``frames`` = temporal_ratio of them at a time,
    keeps two more for each of the seven convolutions of that level, and copies them together for each convolution,
    whose 3-D kernels take as much again to work in. Measured on an H200 at 512 x 512: 0.6 to 0.9 of this.
    """
    narrow = dtype.itemsize
    wide = max(narrow, 4)
    frame_bytes = 4 * narrow + 3 * wide
    stream_bytes = 0 if frames == 1 else 14 * narrow + 2 * (frames + 2) * narrow
    return batch * peak_elements(stages, trace) * (frames * frame_bytes + stream_bytes)


def needed_bytes(
    stages: Stages, traces: Iterable[Sequence[Window]], frames: int, dtype: torch.dtype, batch: int, result_values: int
) -> int:
    """The most that any of ``traces`` takes (``estimated_bytes``), and what a result of ``result_values`` numbers in
    all is put together from: gathered shards, the sum of tiles in fp32, the result itself."""
    work = max(estimated_bytes(stages, trace, frames, dtype, batch) for trace in traces)
    return work + result_values * (2 * dtype.itemsize + 4)


@lru_cache(maxsize=16)
def device_bytes(device: torch.device) -> int:
    """All the memory that ``device`` has; for a CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
