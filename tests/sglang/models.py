"""Small VAEs of SGLang's and of ours with the same weights, as files and as modules; and what SGLang runs them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from sglang.multimodal_gen.configs.models.vaes.qwenimage import QwenImageVAEConfig
from sglang.multimodal_gen.configs.models.vaes.wanvae import WanVAEConfig
from sglang.multimodal_gen.configs.sample.qwenimage import QwenImageSamplingParams
from sglang.multimodal_gen.runtime.loader.component_loaders.vae_loader import VAELoader
from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from sglang.multimodal_gen.runtime.models.vaes.wanvae import AutoencoderKLWan
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from torch import Tensor, nn

from paravae.configs.qwen_image import LATENTS_MEAN, LATENTS_STD
from tests.builders import perturb

BASE_DIM = 8
PIPELINES = {"AutoencoderKLQwenImage": "QwenImagePipeline", "AutoencoderKLWan": "WanPipeline"}


def publish(folder: Path, model: str = "AutoencoderKLQwenImage", **arch: Any) -> Path:
    """Write a small random VAE as diffusers publishes it, in a model directory that SGLang takes for one of its own."""
    torch.manual_seed(0)
    vae = getattr(diffusers, model)(**{"base_dim": BASE_DIM, **arch})
    perturb(vae)
    vae.save_pretrained(folder / "vae")
    index = {"_class_name": PIPELINES[model], "_diffusers_version": "0.37.0", "vae": ["diffusers", model]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def load(args: Any) -> Any:
    """What SGLang's own loader makes of the VAE of a server's model directory."""
    vae, _ = VAELoader().load(f"{args.model_path}/vae", args, "vae", "diffusers")
    return vae


def small_config(**options: Any) -> Any:
    """SGLang's config of the small Qwen-Image VAE, as its loader would fill it in from config.json."""
    config = QwenImageVAEConfig(**{"use_parallel_decode": False, **options})
    config.update_model_arch({"base_dim": BASE_DIM, "latents_mean": LATENTS_MEAN, "latents_std": LATENTS_STD})
    config.post_init()
    return config


def small_wan_config(**options: Any) -> Any:
    config = WanVAEConfig(**{"use_parallel_decode": False, **options})
    config.update_model_arch({"base_dim": BASE_DIM})
    return config


def theirs(config: Any | None = None) -> nn.Module:
    """SGLang's own class, on one rank, with the fixed random weights that all tests use."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(config or small_config())
    perturb(vae)
    return vae.requires_grad_(False).eval()


def their_wan(config: Any | None = None) -> nn.Module:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(config or small_wan_config())
    perturb(vae)
    return vae.requires_grad_(False).eval()


def request(latents: Tensor, **fields: Any) -> Req:
    """A request that has been denoised: what reaches the decoding stage."""
    height, width = (8 * side for side in latents.shape[-2:])
    return Req(
        sampling_params=QwenImageSamplingParams(prompt="", height=height, width=width), latents=latents, **fields
    )
