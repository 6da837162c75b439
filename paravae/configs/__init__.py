"""Data: what a VAE is and how it is run. Imports nothing of paravae."""

from paravae.configs.base import VAEArchConfig, VAEConfig
from paravae.configs.files import load_vae_config
from paravae.configs.qwen_image import QwenImageVAEArchConfig, QwenImageVAEConfig
from paravae.configs.trt import TrtVAEConfig
from paravae.configs.wan import WanVAEArchConfig, WanVAEConfig

__all__ = [
    "QwenImageVAEArchConfig",
    "QwenImageVAEConfig",
    "TrtVAEConfig",
    "VAEArchConfig",
    "VAEConfig",
    "WanVAEArchConfig",
    "WanVAEConfig",
    "load_vae_config",
]
