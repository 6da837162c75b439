"""Every part of a fast decode by itself: how often it runs, its time, and how near that is to what the machine can do.

    python -m benchmarks.parts --output benchmarks/results/parts.json

The parts are not listed by hand: one decode runs on tensors without memory, and what it calls is noted down. Each
part is then timed on random data (L2 flushed before each call), checked against its reference where it has one, and
set against the machine's own rates: its floating-point operations at the rate of a large matrix product, its bytes,
each operand once, at that of a large copy, whichever takes longer.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paravae import AutoencoderKLQwenImage, QwenImageVAEArchConfig, QwenImageVAEConfig
from paravae.launch import bench_report
from paravae.launch.bench_cases import pixel_size
from paravae.launch.bench_timing import call_ms, machine_rates
from paravae.launch.machine import describe
from paravae.layers.attention import wide_attention
from paravae.layers.fused_conv import fused_conv, pack_weight
from paravae.layers.norm_silu import norm_silu
from paravae.layers.to_pixels import to_pixels
from paravae.vae import plan
from paravae.vae.models import flow, folded
from paravae.vae.models.flow import crop_flow
from paravae.vae.models.stage import run_local

_LEAST_FLOPS = 1e7  # smaller library calls are not worth a line


@dataclass(frozen=True)
class Part:
    """A call and its shapes, [B, F, H, W, C] or [N, C, H, W]; ``options``: what else distinguishes it."""

    name: str
    shape: tuple[int, ...]
    out_channels: int
    options: tuple[str, ...]
    flops: int
    values: int
    """Numbers read and written, each operand once."""


class LibraryCalls(TorchDispatchMode):
    """Notes convolutions and matrix products; nothing is computed on tensors without memory."""

    def __init__(self, found: Counter[Part]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self._note(_conv_part(*args, out=out))
        elif func is torch.ops.aten.addmm.default:
            _, a, b = args
            flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            values = a.numel() + b.numel() + out.numel()
            self._note(Part("matrix product", tuple(a.shape), b.shape[1], (), flops, values))
        return out

    def _note(self, part: Part) -> None:
        if part.flops >= _LEAST_FLOPS:
            self._found[part] += 1


def _conv_part(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
               *rest: Any, out: Tensor) -> Part:  # fmt: skip
    kernel = f"{weight.shape[-2]}x{weight.shape[-1]}"
    flops = 2 * weight.numel() * (x if transposed else out).shape[2:].numel() * x.shape[0]
    name = "upsampling convolution" if transposed else "convolution"
    values = x.numel() + weight.numel() + out.numel()
    return Part(name, tuple(x.shape), out.shape[1], (kernel, f"stride {stride[0]}"), flops, values)


@contextmanager
def fused_ops_noted(found: Counter[Part]) -> Iterator[None]:
    """Within, the fused ops note their calls and give tensors without memory."""

    def norm(
        x: Tensor, gamma: Any, bias: Any = None, residual: Any = None, *, silu: bool = True, out: Any = None
    ) -> Tensor:
        words = ("bias",) * (bias is not None) + ("residual",) * (residual is not None)
        words += ("norm",) * (gamma is not None) + ("SiLU",) * (silu and gamma is not None)
        passes = 2 + (residual is not None) * (1 + (gamma is not None))
        found[Part("norm_silu", tuple(x.shape), x.shape[-1], words, 0, passes * x.numel())] += 1
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out

    def conv(x: Tensor, weight: Tensor, packed: Any, bias: Any, gamma: Any = None, residual: Any = None) -> Tensor:
        words = ("residual",) * (residual is not None) + ("norm, SiLU",) * (gamma is not None)
        passes = 1 + (gamma is not None) + 2 * (residual is not None)
        flops = 2 * weight.numel() * x.numel() // x.shape[-1]
        found[Part("fused_conv", tuple(x.shape), x.shape[-1], words, flops, passes * x.numel())] += 1
        return residual if gamma is None and residual is not None else torch.empty_like(x)

    def attention(query: Tensor, keys_values: Tensor) -> Tensor:
        tokens, shape = keys_values.shape[1], tuple(query.shape)
        flops, values = 4 * query.numel() * tokens, 2 * query.numel() + keys_values.numel()
        found[Part("wide_attention", shape, shape[-1], (f"{tokens} tokens",), flops, values)] += 1
        return query.new_empty(shape)

    def pixels(x: Tensor, residual: Any, *rest: Any, as_uint8: bool = False) -> Tensor:
        words = ("residual",) * (residual is not None)
        values = x.numel() * (1 + (residual is not None)) + 3 * x.numel() // x.shape[-1]
        found[Part("to_pixels", tuple(x.shape), 3, words, 54 * x.numel(), values)] += 1
        return x.new_empty((x.shape[0], 3, 1, *x.shape[2:4]))

    patched = [
        (flow, "norm_silu", norm), (folded, "norm_silu", norm), (flow, "fused_conv", conv),
        (folded, "wide_attention", attention), (folded, "to_pixels", pixels),
    ]  # fmt: skip
    patches = [mock.patch.object(module, name, function) for module, name, function in patched]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def parts_of_decode(base_dim: int, width: int, height: int, dtype: torch.dtype) -> Counter[Part]:
    """What one decode of an image calls, and how often."""
    arch = QwenImageVAEArchConfig(base_dim=base_dim)
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(QwenImageVAEConfig(arch_config=arch)).to(dtype)
        latents = torch.empty((1, arch.z_dim, 1, height // 8, width // 8), dtype=dtype)
    decoder = folded.FoldedDecoder(vae.post_quant_conv, vae.decoder)
    trace = plan.whole(vae.engine.decoder_stages, height // 8, width // 8)
    found: Counter[Part] = Counter()
    with torch.no_grad(), fused_ops_noted(found), LibraryCalls(found):
        front = plan.whole(vae.engine.decoder_front, height // 8, width // 8)
        attended = decoder.attention(run_local(decoder.front(), latents, front, None, crop_flow))
        run_local(decoder.tail(as_uint8=False), attended, trace, None, crop_flow)
    return found


def calls_of(
    part: Part, dtype: torch.dtype, device: torch.device, *, repeatable: bool
) -> tuple[Callable[[], Tensor], Callable[[], Tensor] | None]:
    """The part on random data, and its reference if it is one of ours.

    ``repeatable``: what is written over is copied first, so that every call gives the same, if it takes longer.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if part.name in ("convolution", "upsampling convolution"):
        return _library_conv(part, draw), None
    if part.name == "matrix product":
        a, b, bias = draw(*part.shape), draw(part.out_channels, part.shape[1]), draw(part.out_channels)
        return lambda: F.linear(a, b, bias), None
    x, wide = draw(*part.shape), torch.float32
    channels = part.shape[-1]
    if part.name == "wide_attention":
        keys_values = draw(part.shape[0], int(part.options[0].split()[0]), 2 * channels)
        return lambda: wide_attention(x, keys_values), lambda: wide_attention.reference(x, keys_values)
    residual = draw(*part.shape) if "residual" in part.options else None

    def taken() -> Tensor | None:
        return residual.clone() if residual is not None and repeatable else residual

    bias, gamma = draw(channels, dtype=wide), 1 + 0.1 * draw(channels, dtype=wide)
    if part.name == "to_pixels":
        columns, colour_bias = draw(channels, 32) / 30, draw(3, dtype=wide) / 10
        ours = (x, residual, bias, gamma, columns, colour_bias)
        return lambda: to_pixels(*ours), lambda: to_pixels.reference(*ours)
    normed = gamma if any("norm" in word for word in part.options) else None
    if part.name == "fused_conv":
        weight = (draw(channels, channels, 3, 3) / (3 * channels**0.5)).contiguous(memory_format=torch.channels_last)
        packed = pack_weight(weight)
        return (
            lambda: fused_conv(x, weight, packed, bias, normed, taken()),
            lambda: fused_conv.reference(x, weight, packed, bias, normed, taken()),
        )
    silu = "SiLU" in part.options
    return (
        lambda: norm_silu(x, normed, bias, taken(), silu=silu),
        lambda: norm_silu.reference(x, normed, bias, taken(), silu=silu),
    )


def _library_conv(part: Part, draw: Callable[..., Tensor]) -> Callable[[], Tensor]:
    batch, channels, height, width = part.shape
    side = int(part.options[0][0])
    x = draw(batch, height, width, channels).permute(0, 3, 1, 2)
    if part.name == "convolution":
        weight = draw(part.out_channels, side, side, channels).permute(0, 3, 1, 2)
        return lambda: F.conv2d(x, weight, padding=side // 2)
    weight = draw(channels, side, side, part.out_channels).permute(0, 3, 1, 2)
    return lambda: F.conv_transpose2d(x, weight, stride=2, padding=1)


def measure(
    part: Part, count: int, rates: dict[str, float], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """A row: checked, then timed."""
    call, reference = calls_of(part, dtype, device, repeatable=True)
    row: dict[str, Any] = {"part": part.name, "shape": part.shape, "out_channels": part.out_channels}
    row |= {"options": part.options, "count": count, "flops": part.flops, "bytes": part.values * dtype.itemsize}
    if reference is not None:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            ours, theirs = call().float(), reference().float()
        row["rms_difference"] = float(f"{float((ours - theirs).square().mean().sqrt()):.4g}")
        row["rms"] = float(f"{float(theirs.square().mean().sqrt()):.4g}")
    call, _ = calls_of(part, dtype, device, repeatable=False)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        row["ms"] = round(_median_ms(call, device), 4)
    floor_s = max(part.flops / 1e12 / rates["bf16_matmul_tflops"], row["bytes"] / 1e9 / rates["copy_gb_per_s"])
    return row | {"floor_ms": round(1e3 * floor_s, 4), "share_of_floor": round(1e3 * floor_s / row["ms"], 3)}


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        import triton

        return float(triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median"))
    return min(call_ms(call, device) for _ in range(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=pixel_size, default="1024x1024", help="width x height in pixels (default: %(default)s)"
    )
    parser.add_argument("--base-dim", type=int, default=96, help="default: 96, the published model")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    width, height = args.size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    rates = machine_rates(device)
    found = parts_of_decode(args.base_dim, width, height, dtype)
    with torch.no_grad():
        rows = [measure(part, count, rates, dtype, device) for part, count in found.items()]
    rows.sort(key=lambda row: -row["count"] * row["ms"])
    head = {
        "what": f"the parts of one fast decode, {width}x{height}, base_dim {args.base_dim}, bfloat16",
        "machine": describe(1),
        "rates": rates,
    }
    bench_report.write(args.output, head, rows)
    for row in rows:
        print(f"{row['count']:3d} x {row['ms']:8.4f} ms, {row['share_of_floor']:4.0%} of what is possible: "
              f"{row['part']} {list(row['shape'])} -> {row['out_channels']} {' '.join(row['options'])}")  # fmt: skip
    print(f"sum {sum(row['count'] * row['ms'] for row in rows):.3f} ms")


if __name__ == "__main__":
    main()
