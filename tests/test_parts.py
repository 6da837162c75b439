"""The parts of a decode, as benchmarks/parts.py finds and times them."""

from __future__ import annotations

import torch

from benchmarks.parts import measure, parts_of_decode
from paravae import AutoencoderKLQwenImage, QwenImageVAEArchConfig, QwenImageVAEConfig
from paravae.vae import plan

RATES = {"bf16_matmul_tflops": 1.0, "copy_gb_per_s": 10.0}


def test_parts_add_up_to_the_planned_work() -> None:
    """All products and convolutions: what planning counts, but for upsampling, which folding makes 4/9 of it."""
    found = parts_of_decode(96, 256, 192, torch.bfloat16)
    total = sum(count * part.flops for part, count in found.items())
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(QwenImageVAEConfig(arch_config=QwenImageVAEArchConfig()))
    engine = vae.engine
    planned = 2 * sum(
        plan.local_work(stages, plan.whole(stages, 24, 32)) for stages in (engine.decoder_front, engine.decoder_stages)
    )
    planned += 2 * (plan.attention_work(384, 24 * 32, 24 * 32) + plan.projections_work(384, 24 * 32))
    upsampling = sum(count * part.flops for part, count in found.items() if part.name == "upsampling convolution")
    projection = 2 * 24 * 32 * 384 * 384  # folded into the values
    assert total + upsampling * 5 / 4 + projection == planned


def test_a_convolution_is_never_followed_by_its_bias_alone() -> None:
    found = parts_of_decode(96, 128, 128, torch.bfloat16)
    norms = [part for part in found if part.name == "norm_silu"]
    assert norms
    assert all("norm" in part.options or "residual" in part.options for part in norms)


def test_every_kind_of_part_is_measured() -> None:
    found = parts_of_decode(24, 64, 64, torch.float32)
    for name in {part.name for part in found}:
        part = next(part for part in found if part.name == name)
        row = measure(part, 1, RATES, torch.float32, torch.device("cpu"))
        assert row["ms"] > 0
        assert row["floor_ms"] > 0
        if "rms" in row:
            assert row["rms"] > 0.01
            assert row["rms_difference"] <= 1e-5
