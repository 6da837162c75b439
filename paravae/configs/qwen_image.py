"""The VAE of Qwen-Image: the Wan 2.1 VAE under another name, with the same constants."""

from __future__ import annotations

from dataclasses import dataclass, field

from paravae.configs.base import VAEArchConfig, VAEConfig, option

# Published in the config.json of Qwen/Qwen-Image (vae) and Wan-AI/Wan2.1-*-Diffusers (vae), to four decimals.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QwenImageVAEArchConfig(VAEArchConfig):
    """Qwen-Image's architecture: 8x in space, 4x in time, 16 latent channels."""

    latents_mean: tuple[float, ...] = option(LATENTS_MEAN, "mean of each latent channel")
    latents_std: tuple[float, ...] = option(LATENTS_STD, "standard deviation of each latent channel")


@dataclass(frozen=True, kw_only=True)
class QwenImageVAEConfig(VAEConfig):
    """How to run Qwen-Image's VAE."""

    arch_config: QwenImageVAEArchConfig = field(default_factory=QwenImageVAEArchConfig)
