"""The model that is timed: its weights once, in fp32 on the host, from which every contestant is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig, VAEConfig

_SEED = 0
_GAIN = 2.5  # of the last convolution: pictures then fill [-1, 1] without being clamped much


@dataclass(frozen=True)
class Model:
    """``name`` says which it is; ``state`` holds fp32 tensors on the host under the published names."""

    name: str
    config: VAEConfig
    state: Mapping[str, Tensor]

    def build(self, config: VAEConfig, dtype: torch.dtype, device: torch.device) -> AutoencoderKLQwenImage:
        """The model in ``dtype`` on ``device``, run as ``config`` says."""
        with torch.device("meta"):
            vae = AutoencoderKLQwenImage(config)
        # A copy even where nothing changes, so that no contestant can spoil what the others are built from.
        state = {key: tensor.to(device, dtype, copy=True) for key, tensor in self.state.items()}
        vae.load_state_dict(state, assign=True)
        return vae.requires_grad_(False).eval()


def plain(config: VAEConfig) -> VAEConfig:
    """``config`` run by plain PyTorch, on one rank, with whatever memory it takes."""
    return replace(
        config, use_parallel_decode=False, use_tiling=False, memory_limit_gib=None, engine="torch", vae_type="pytorch"
    )


def load(directory_or_repo: str | None, subfolder: str | None, config: VAEConfig) -> Model:
    """The model of a checkpoint; without one, the full-size architecture with seeded random weights.

    Raises:
        FileNotFoundError, ValueError: as ``from_pretrained`` does.
    """
    if directory_or_repo is None:
        if subfolder is not None:
            raise ValueError(f"--subfolder {subfolder} means nothing without --model: random weights have no folder")
        return random_model(config)
    vae = AutoencoderKLQwenImage.from_pretrained(directory_or_repo, subfolder, vae_config=config)
    return Model(str(directory_or_repo), vae.config, vae.state_dict())


def random_model(config: VAEConfig | None = None) -> Model:
    """PyTorch's usual initial weights, from a fixed seed: no checkpoint is needed, and times are those of one."""
    config = config or QwenImageVAEConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        vae = AutoencoderKLQwenImage(config)
    if vae.decoder is not None:
        vae.decoder.conv_out.weight.mul_(_GAIN)
    return Model(f"random weights (seed {_SEED}), base_dim {config.arch_config.base_dim}", config, vae.state_dict())
