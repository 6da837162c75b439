"""Small models and inputs with fixed seeds, the same in every process and on every device."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from paravae import AutoencoderKLQwenImage, QwenImageVAEArchConfig, QwenImageVAEConfig

SMALL = QwenImageVAEArchConfig(base_dim=8)


def perturb(model: nn.Module) -> None:
    """Add noise to every parameter, so that no gamma is one and no bias without effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if name.endswith(("gamma", "bias")) else 0.02
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter))


def small_vae(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    arch: QwenImageVAEArchConfig = SMALL,
    **options: Any,
) -> AutoencoderKLQwenImage:
    """A VAE of base_dim 8 with random weights; ``options`` are fields of its config."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(QwenImageVAEConfig(arch_config=arch, **options))
    perturb(vae)
    return vae.to(device=device, dtype=dtype)


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0) -> Tensor:
    """Standard normal numbers, drawn on the CPU so that every device gets the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def pictures(*shape: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """Pixels in [-1, 1]."""
    return noise(*shape, dtype=dtype, device=device).clamp(-1, 1)


def max_error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in fp64; shapes must agree."""
    assert a.shape == b.shape, f"{list(a.shape)} against {list(b.shape)}"
    return float((a.detach().double() - b.detach().double()).abs().max())


def rms_error(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference, in fp64; shapes must agree."""
    assert a.shape == b.shape, f"{list(a.shape)} against {list(b.shape)}"
    return float((a.detach().double() - b.detach().double()).square().mean().sqrt())


def digest(*tensors: Tensor) -> str:
    """A name for exactly these values."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(str((tensor.shape, tensor.dtype)).encode())
        hasher.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return hasher.hexdigest()
