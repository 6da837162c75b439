"""The VAEs that SGLang's loader makes and its stages call: SGLang's attributes outside, paravae's VAE inside.

A served VAE shares its parts (``encoder``, ``quant_conv``, ``post_quant_conv``, ``decoder``) with paravae's VAE, so the
state dict, ``.to()``, casts and offloading that SGLang applies to the one reach the other. Shapes and ranges are those
of paravae/vae/parallel.py; latents come denormalised, as SGLang's decoding stage hands them over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from sglang.multimodal_gen.runtime.cache.conditioning import cached_vae_encode, conditioning_weights_epoch
from sglang.multimodal_gen.runtime.distributed import (
    get_decode_parallel_group_coordinator,
    model_parallel_is_initialized,
)
from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import ComponentCheckpointUnsupportedError
from sglang.multimodal_gen.runtime.models.vaes.common import ParallelTiledVAE as SGLangVAE
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from torch import Tensor, nn

from paravae.configs import QwenImageVAEConfig, WanVAEConfig
from paravae.integrations.sglang_config import (
    QWEN_IMAGE_PIPELINES,
    WAN_PIPELINES,
    foreign_reason,
    translate,
    unknown_pipeline,
)
from paravae.vae.autoencoders import AutoencoderKLQwenImage, AutoencoderKLWan
from paravae.vae.models.checkpoint import mismatch

logger = init_logger(__name__)

OnFrames = Callable[[Tensor], object]


def qwen_image_vae(config: Any) -> nn.Module:
    """What SGLang's registry has for AutoencoderKLQwenImage: paravae's, or SGLang's own where ours would not do."""
    if _serves("AutoencoderKLQwenImage", config, QWEN_IMAGE_PIPELINES):
        return ServedQwenImageVAE(config)
    from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl_qwenimage import AutoencoderKLQwenImage as Theirs

    return Theirs(config)


def wan_vae(config: Any) -> nn.Module:
    """What SGLang's registry has for AutoencoderKLWan: paravae's, or SGLang's own where ours would not do."""
    if _serves("AutoencoderKLWan", config, WAN_PIPELINES):
        return ServedWanVAE(config)
    from sglang.multimodal_gen.runtime.models.vaes.wanvae import AutoencoderKLWan as Theirs

    return Theirs(config)


def _serves(name: str, config: Any, pipelines: tuple[str, ...]) -> bool:
    reason = foreign_reason(config.arch_config) or unknown_pipeline(pipelines)
    if reason is not None:
        logger.info("paravae: SGLang's own %s serves, since %s", name, reason)
    return reason is None


@SGLangVAE.register  # what its stages ask before they hand over ``on_frames``; its layerwise offload is not inherited
class ServedVAE(nn.Module):
    """What both models have in common."""

    supports_decode_on_frames = False

    def __init__(self, sglang_config: Any, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        self._inside = (vae,)  # in a tuple: its parts are registered below, under the checkpoint's names
        self._shared = vae.config.use_parallel_decode
        self._coordinator: Any = None
        self._weights_epoch = conditioning_weights_epoch()
        vae.config = replace(vae.config, use_parallel_decode=False)  # alone until SGLang has its decode group
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.sglang_config = sglang_config
        how = f"parallel decode in mode {self.parallel_decode_mode}" if self._shared else "no parallel decode"
        logger.info("paravae: serves %s, %s", type(vae).__name__, how)

    # ------------------------------------------------------------------------------- what SGLang asks for

    @property
    def vae(self) -> AutoencoderKLQwenImage:
        """paravae's VAE inside; its ``last_choice`` says how the last decode was shared, and why."""
        return self._inside[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @property
    def use_parallel_decode(self) -> bool:
        """Whether decodes are to be shared; SGLang's stage then lets every rank of a CFG-parallel server decode."""
        return self._shared

    @property
    def parallel_decode_mode(self) -> str:
        return self.vae.config.exact_mode

    @property
    def use_tiling(self) -> bool:
        return self.vae.config.use_tiling

    @property
    def z_dim(self) -> int:
        return self.vae.config.arch_config.z_dim

    @property
    def temperal_downsample(self) -> list[bool]:
        return list(self.vae.config.arch_config.temperal_downsample)

    @property
    def temporal_compression_ratio(self) -> int:
        return self.vae.config.arch_config.temporal_ratio

    @property
    def spatial_compression_ratio(self) -> int:
        return self.vae.config.arch_config.spatial_ratio

    @property
    def latents_mean(self) -> list[float]:
        return list(self.vae.config.arch_config.latents_mean)

    @property
    def latents_std(self) -> list[float]:
        return list(self.vae.config.arch_config.latents_std)

    @property
    def scaling_factor(self) -> float | Tensor:
        return self.sglang_config.scaling_factor

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Decode in tiles where a rank decodes alone: less memory, approximate. Sizes in pixels; None leaves them."""
        given = {name: value for name, value in locals().items() if name.startswith("tile_") and value is not None}
        if given or not self.use_tiling:  # called for every request, while a new config has plans made anew
            self.vae.config = replace(self.vae.config, use_tiling=True, **given)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's, but never with less than the whole: SGLang loads without ``strict`` and warns at most.

        Raises:
            ComponentCheckpointUnsupportedError: a tensor is missing, has another shape, or belongs to another network.
        """
        missing, foreign, misshapen = mismatch(self.state_dict(), state_dict)
        for fault, names in (("missing", missing), ("of another network", foreign), ("of another shape", misshapen)):
            if names:
                raise _refusal(f"{len(names)} tensors of the VAE's checkpoint are {fault}, such as {names[0]}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    # ---------------------------------------------------------------------------------- decode and encode

    @torch.compiler.disable  # --enable-torch-compile would trace it: ranks that agree over sockets, kernels of its own
    def decode(self, z: Tensor, return_dict: bool = True) -> Tensor:
        """Latents [B, z_dim, T, h, w] -> pixels [B, 3, F, 8 h, 8 w] in [-1, 1] and the weights' dtype, on every rank.

        ``return_dict`` changes nothing, as in SGLang. Raises: as ``AutoencoderKLQwenImage.decode`` does.
        """
        with self._plainly():
            return self._ready().decode(z.to(self.dtype))

    @torch.compiler.disable
    @cached_vae_encode
    def encode(self, x: Tensor, return_dict: bool = True) -> DiagonalGaussianDistribution:
        """Pixels [B, 3, F, H, W] in [-1, 1] -> the posterior of their latents, by each rank for itself."""
        self._notice_new_weights()
        with self._plainly():
            posterior = self.vae.encode(x.to(self.dtype))
        return DiagonalGaussianDistribution(posterior.moments)

    def _plainly(self) -> Any:
        """paravae computes in its weights' dtype; autocast would cast them again for every layer."""
        return torch.autocast(self.device.type, enabled=False)

    def _notice_new_weights(self) -> None:
        """SGLang's weight updates copy into ``.data``, which PyTorch does not count as a change; SGLang counts them.
        At another address the weights are new ones to the engine, which keeps folded copies."""
        epoch = conditioning_weights_epoch()
        if epoch != self._weights_epoch:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()
            self._weights_epoch = epoch

    def _ready(self) -> AutoencoderKLQwenImage:
        """The VAE inside, on SGLang's decode group (tp x sp x pp x cfg of one replica), which exists by now."""
        self._notice_new_weights()
        if not self._shared:
            return self.vae
        coordinator = get_decode_parallel_group_coordinator() if model_parallel_is_initialized() else None
        if coordinator is not self._coordinator:
            shared = False
            if coordinator is not None and coordinator.world_size > 1:
                shared = True
                self.vae.set_parallel_group(coordinator.device_group)
            self.vae.config = replace(self.vae.config, use_parallel_decode=shared)
            self._coordinator = coordinator
        return self.vae


class ServedQwenImageVAE(ServedVAE):
    """Qwen-Image's VAE, as SGLang's class of that name: ``config`` is the arch config."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, AutoencoderKLQwenImage(_translated(config, QwenImageVAEConfig)))
        self.config = config.arch_config

    @property
    def shift_factor(self) -> Tensor:
        """The latents' means, [1, z_dim, 1, 1, 1]."""
        return torch.tensor(self.latents_mean, device=self.device, dtype=self.dtype).view(1, -1, 1, 1, 1)


class ServedWanVAE(ServedVAE):
    """Wan 2.1's VAE, as SGLang's class of that name: pixels are fp32, frames are handed out as they are ready."""

    supports_decode_on_frames = True

    def __init__(self, config: Any) -> None:
        super().__init__(config, AutoencoderKLWan(_translated(config, WanVAEConfig)))
        self.config = config

    @property
    def shift_factor(self) -> Tensor:
        return self.sglang_config.shift_factor

    @torch.compiler.disable
    def decode(self, z: Tensor, on_frames: OnFrames | None = None) -> Tensor:
        """As ``ServedVAE.decode``, in fp32. ``on_frames`` gets every frame once, in order, as soon as it is final."""
        pieces: list[Tensor] = []

        def take(frames: Tensor) -> None:
            pieces.append(frames.float())
            if on_frames is not None:
                on_frames(pieces[-1])

        with self._plainly():  # in pieces on every rank: SGLang gives on_frames to the one that writes the file
            self._ready().decode(z.to(self.dtype), on_frames=take)
        return torch.cat(pieces, dim=2)

    def causal_decode(self, z: Tensor) -> Tensor:
        """A realtime session's next latents. Without this method SGLang would decode each piece as a clip of its own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "paravae keeps nothing from one decode to the next, which a realtime session needs; "
            "start the server with PARAVAE_SGLANG=0"
        )


def _translated(config: Any, config_class: type[Any]) -> Any:
    try:
        return translate(config, config_class)
    except ValueError as error:
        raise _refusal(str(error)) from error


def _refusal(text: str) -> Exception:
    """For any other kind of error SGLang's loader takes diffusers' class instead, and says so in passing."""
    return ComponentCheckpointUnsupportedError(f"paravae: {text}. PARAVAE_SGLANG=0 has SGLang's own VAE serve instead")
