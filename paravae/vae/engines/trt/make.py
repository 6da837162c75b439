"""The TensorRT engine of a VAE, from its config."""

from __future__ import annotations

from torch import nn

from paravae.configs import VAEArchConfig, VAEConfig
from paravae.vae.engines.base import Engine
from paravae.vae.engines.trt.parts import Part
from paravae.vae.engines.trt.store import EngineFolder
from paravae.vae.engines.trt.trt_engine import TensorRTEngine
from paravae.vae.engines.trt.weights import Weights


def tensorrt_engine(vae: nn.Module, config: VAEConfig, inner: Engine) -> TensorRTEngine:
    """``inner``, a PyTorch engine of the weights of ``vae``, with the engines that ``config`` names before it."""
    how = config.trt_vae_config
    store = EngineFolder(how, Weights(vae), graphs=config.cuda_graphs if how.cuda_graph else 0)
    return TensorRTEngine(inner, store, part_channels(config.arch_config, inner), strict=how.strict)


def part_channels(arch: VAEArchConfig, inner: Engine) -> dict[Part, int]:
    """Channels of what each part gives."""
    return {
        "decoder": arch.input_channels,
        "decoder_head": inner.attention_channels,
        "decoder_tail": arch.input_channels,
        "encoder": 2 * arch.z_dim,
        "encoder_body": inner.feature_channels,
        "encoder_head": 2 * arch.z_dim,
    }
