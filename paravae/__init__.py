"""paravae: the VAE of Qwen-Image and Wan 2.1, decoded by one GPU or many, with the same pixels."""

from paravae.configs import (
    QwenImageVAEArchConfig,
    QwenImageVAEConfig,
    TrtVAEConfig,
    VAEArchConfig,
    VAEConfig,
    WanVAEConfig,
    load_vae_config,
)
from paravae.vae.autoencoders import AutoencoderKLQwenImage, AutoencoderKLWan
from paravae.vae.choice import DecodeChoice
from paravae.vae.comm import RankError
from paravae.vae.parallel import ParallelTiledVAE
from paravae.vae.posterior import Posterior

__version__ = "0.1.0"

__all__ = [
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "DecodeChoice",
    "ParallelTiledVAE",
    "Posterior",
    "QwenImageVAEArchConfig",
    "QwenImageVAEConfig",
    "RankError",
    "TrtVAEConfig",
    "VAEArchConfig",
    "VAEConfig",
    "WanVAEConfig",
    "load_vae_config",
]
