"""Fused operations: each its kernels, a plain PyTorch reference of the same signature, and which of them runs."""

from paravae.layers.dispatch import fallbacks, references_only

__all__ = ["fallbacks", "references_only"]
