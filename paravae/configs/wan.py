"""The VAE of Wan 2.1: the same tensors and constants as Qwen-Image's (Wan 2.2's 5B VAE is another model)."""

from __future__ import annotations

from dataclasses import dataclass, field

from paravae.configs.base import VAEConfig
from paravae.configs.qwen_image import QwenImageVAEArchConfig


@dataclass(frozen=True, kw_only=True)
class WanVAEArchConfig(QwenImageVAEArchConfig):
    """Wan 2.1's architecture: Qwen-Image's, under its first name."""


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig(VAEConfig):
    """How to run Wan 2.1's VAE."""

    arch_config: WanVAEArchConfig = field(default_factory=WanVAEArchConfig)
