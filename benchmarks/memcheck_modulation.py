"""Every modulation op over odd sizes and views, for a memory checker to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python -m benchmarks.memcheck_modulation [--out-of-bounds]

Without PyTorch's caching each tensor is an allocation of its own, so a byte read or written past its end is seen.
``--out-of-bounds`` gives the kernel, past all checks, tables of too few channels: the checker must find that.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paravae import layers
from paravae.layers.modulate_kernel import launch

CHANNELS = (
    (5, torch.bfloat16),
    (96, torch.float16),
    (3000, torch.float32),
    (3072, torch.bfloat16),
    (16_384, torch.bfloat16),
)
SHAPES = ((1, 7), (3, 5))


def all_ops(x: Tensor, residual: Tensor, tables: Sequence[Tensor], index: Tensor) -> None:
    """``tables``: six, and two of one row, for weight and bias."""
    a0, b0, c0, a1, b1, c1, *_ = tables
    weight, bias = tables[6][0], tables[7][0]
    forced: dict[str, Any] = {"force": "cuda"}
    layers.FusedLayerNormScaleShift(**forced)(x, weight, bias, a0, b0)
    layers.FusedLayerNormScaleShiftSelect01(**forced)(x, None, None, a0, b0, a1, b1, index)
    layers.FusedLayerNormScaleShiftGateSelect01(**forced)(x, weight, None, a0, b0, c0, a1, b1, c1, index)
    layers.FusedResidualLayerNormScaleShift(**forced)(x, residual, c0, None, bias, a0, b0)
    layers.FusedResidualLayerNormScaleShiftSelect01(**forced)(x, residual, c0, c1, weight, bias, a0, b0, a1, b1, index)
    layers.FusedResidualLayerNormScaleShiftGateSelect01(**forced)(
        x, residual, residual, weight, bias, a0, b0, c0, a1, b1, c1, index
    )
    layers.FusedResidual(**forced)(x, residual, c0)
    layers.FusedResidualSelect01(**forced)(x, residual, c0, c1, index)


def over_odd_sizes() -> None:
    for (channels, dtype), (batch, tokens) in itertools.product(CHANNELS, SHAPES):
        made: dict[str, Any] = {"device": "cuda", "dtype": dtype}
        wide = torch.randn(batch, 2 * tokens - 1, channels, **made)
        residual = torch.randn(batch, tokens, channels, **made)
        index = torch.randint(0, 2, (batch, tokens), device="cuda")
        for shape in ((batch,), (1,), (batch, tokens)):
            tables = torch.randn(*shape, 8 * channels, **made).chunk(8, -1)
            vectors = [table.reshape(-1, channels)[:1] for table in tables[6:]]
            all_ops(wide[:, ::2], residual, [*tables[:6], *vectors], index)
    assert not layers.fallbacks(), layers.fallbacks()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-of-bounds", action="store_true", help="do what the checker must find")
    args = parser.parse_args(arguments)
    if args.out_of_bounds:
        x, table = torch.randn(1, 3, 3072, device="cuda"), torch.randn(1, 8, device="cuda")
        launch(x, None, [], None, None, [table], [table], [], None, 0.0, "layer")
    else:
        over_odd_sizes()
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
