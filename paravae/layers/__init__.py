"""Fused operations: each its kernels, a plain PyTorch reference of the same signature, and which of them runs.

The VAE's are used by its engines; those of a diffusion transformer (``modulation.py``) are for all to use.
"""

from paravae.layers.custom_op import CustomOp, describe_ops
from paravae.layers.dispatch import fallbacks, references_only
from paravae.layers.fuse_transformer import fuse_transformer, unfuse_transformer
from paravae.layers.modulation import (
    FusedLayerNormScaleShift,
    FusedLayerNormScaleShiftGateSelect01,
    FusedLayerNormScaleShiftSelect01,
    FusedResidual,
    FusedResidualLayerNormScaleShift,
    FusedResidualLayerNormScaleShiftGateSelect01,
    FusedResidualLayerNormScaleShiftSelect01,
    FusedResidualSelect01,
)

__all__ = [
    "CustomOp",
    "FusedLayerNormScaleShift",
    "FusedLayerNormScaleShiftGateSelect01",
    "FusedLayerNormScaleShiftSelect01",
    "FusedResidual",
    "FusedResidualLayerNormScaleShift",
    "FusedResidualLayerNormScaleShiftGateSelect01",
    "FusedResidualLayerNormScaleShiftSelect01",
    "FusedResidualSelect01",
    "describe_ops",
    "fallbacks",
    "fuse_transformer",
    "references_only",
    "unfuse_transformer",
]
