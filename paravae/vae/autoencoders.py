"""The public models: the Qwen-Image VAE and, the same network under its first name, the Wan 2.1 VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from paravae.configs import QwenImageVAEConfig, VAEConfig, WanVAEConfig
from paravae.vae.engines.fast_engine import FastEngine
from paravae.vae.engines.torch_engine import Networks, TorchEngine
from paravae.vae.engines.trt.make import tensorrt_engine
from paravae.vae.engines.trt.trt_engine import TensorRTEngine
from paravae.vae.models import checkpoint
from paravae.vae.models.blocks import CausalConv3d
from paravae.vae.models.decoder import Decoder
from paravae.vae.models.encoder import Encoder
from paravae.vae.parallel import ParallelTiledVAE


class AutoencoderKLQwenImage(ParallelTiledVAE):
    """Qwen-Image's VAE. Its state dict is that of diffusers' class of the same name, key for key.

    Latents are [B, 16, T, h, w], pixels [B, 3, 4 T - 3, 8 h, 8 w] in [-1, 1].
    """

    config_class: type[VAEConfig] = QwenImageVAEConfig

    def __init__(self, config: VAEConfig | None = None) -> None:
        config = config or self.config_class()
        super().__init__(config)
        arch = config.arch_config
        self.encoder = Encoder(arch) if config.load_encoder else None
        self.quant_conv = CausalConv3d(2 * arch.z_dim, 2 * arch.z_dim, 1) if config.load_encoder else None
        self.post_quant_conv = CausalConv3d(arch.z_dim, arch.z_dim, 1) if config.load_decoder else None
        self.decoder = Decoder(arch) if config.load_decoder else None
        networks = Networks(
            self.encoder, self.quant_conv, self.post_quant_conv, self.decoder, temporal_ratio=arch.temporal_ratio
        )
        engine: TorchEngine | TensorRTEngine = TorchEngine(networks)
        if config.engine != "torch":
            engine = FastEngine(networks, everywhere=config.engine == "fast", graphs=config.cuda_graphs)
        if config.vae_type == "tensorrt":
            engine = tensorrt_engine(self, config, engine)
        self.use_engine(engine)
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        directory_or_repo: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        vae_config: VAEConfig | None = None,
    ) -> Self:
        """Load a checkpoint in diffusers' layout: config.json beside diffusion_pytorch_model.safetensors.

        ``directory_or_repo``: a directory, or a repository of the Hugging Face hub. ``vae_config``: how to run it;
        its ``arch_config`` gives way to what the checkpoint's own config.json says.

        Raises:
            FileNotFoundError: there is no such directory or file.
            ValueError: the files are not such a checkpoint: another model, truncated, pickled, misshapen.
        """
        folder = checkpoint.locate(directory_or_repo, subfolder)
        vae_config = vae_config or cls.config_class()
        arch = checkpoint.read_arch(folder, type(vae_config.arch_config))
        with torch.device("meta"):
            vae = cls(replace(vae_config, arch_config=arch))
        tensors = checkpoint.read_tensors(folder, vae.state_dict(), torch_dtype, torch.device(device))
        vae.load_state_dict(tensors, assign=True)
        vae.requires_grad_(False).eval()
        if vae_config.vae_type == "tensorrt":
            vae.warm_up(vae_config.trt_vae_config.warm_up_sizes)
        return vae

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the checkpoint that ``from_pretrained`` and diffusers read."""
        checkpoint.save(Path(directory), type(self).__name__, self.config.arch_config, self.state_dict())

    def engine_report(self) -> dict[str, Any]:
        """What has run: calls by TensorRT, and how often PyTorch stood in for it, by reason; engines that are loaded,
        and how often and how long each was being loaded. Empty for ``vae_type`` "pytorch"."""
        return self.engine.summary() if isinstance(self.engine, TensorRTEngine) else {}

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents as the encoder gives them -> as diffusion models use them: (z - mean) / std, by channel."""
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents as diffusion models hand them over -> as ``decode`` takes them: z * std + mean, by channel."""
        mean, std = self._latent_statistics(latents)
        return latents * std + mean

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        arch = self.config.arch_config
        if not (arch.latents_mean and arch.latents_std):
            raise ValueError("this checkpoint's config.json has no latents_mean and latents_std: cannot (de)normalise")
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in (arch.latents_mean, arch.latents_std)
        )
        return mean, std


class AutoencoderKLWan(AutoencoderKLQwenImage):
    """Wan 2.1's VAE."""

    config_class = WanVAEConfig
