"""diffusers' pipelines with paravae in them: its VAE, and its fused ops in the transformer; and out of them again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from paravae.configs import VAEConfig
from paravae.integrations import diffusers_vae
from paravae.integrations.diffusers_vae import PipelineVAE
from paravae.layers import fuse_transformer, unfuse_transformer

logger = logging.getLogger("paravae")

_CLASSES = {kind.__name__: kind for kind in (diffusers_vae.AutoencoderKLQwenImage, diffusers_vae.AutoencoderKLWan)}


def paravae_vae_for(
    pipe: Any, vae_config: VAEConfig | None = None, group: torch.distributed.ProcessGroup | None = None
) -> PipelineVAE:
    """A VAE to set as ``pipe.vae``, on the weights of the one that is there: none is copied. ``pipe`` stays as it is.

    Args:
        pipe: a pipeline of diffusers with the VAE of Qwen-Image or Wan 2.1.
        vae_config: how to run it. Default: by this process alone; ``use_parallel_decode=True`` shares every decode and
            encode among the ranks of torch.distributed.
        group: share among its ranks.

    Raises:
        ValueError: another VAE, or one with hooks, quantized, or not loaded.
    """
    theirs = getattr(pipe, "vae", None)
    if theirs is None:
        raise ValueError(f"{type(pipe).__name__} has no vae: need a pipeline of diffusers, loaded with its VAE")
    kind = _CLASSES.get(type(theirs).__name__, PipelineVAE)  # which refuses it
    return kind.on_weights_of(theirs, vae_config, group)


@dataclass(frozen=True)
class Accelerated:
    """What ``accelerate`` did to ``pipe``. ``not_fused``: why the transformer is as it was; empty if it is fused."""

    pipe: Any
    vae: PipelineVAE
    original_vae: Any
    not_fused: str

    def restore(self) -> None:
        """Undo it: the VAE that was there, on the device and in the dtype of now, and the transformer unfused.

        Raises:
            ValueError: the pipeline has another VAE by now, or hooks that were put on since. Nothing is changed then.
        """
        if self.pipe.vae is not self.vae:
            raise ValueError(
                f"pipe.vae is a {type(self.pipe.vae).__name__} that accelerate did not set: is it restored?"
            )
        if hasattr(self.vae, "_hf_hook"):
            raise ValueError("the pipeline is offloaded: call pipe.remove_all_hooks() first, and offload again after")
        if not self.not_fused:
            unfuse_transformer(_uncompiled(self.pipe.transformer))
        self.pipe.vae = self.original_vae.to(device=self.vae.device, dtype=self.vae.dtype)


def accelerate(
    pipe: Any,
    vae_config: VAEConfig | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    fuse: bool | None = None,
) -> Accelerated:
    """Have ``pipe`` decode and encode by paravae, and its transformer modulate by fused ops. To be called before
    offloading and torch.compile.

    Args:
        pipe, vae_config, group: as of ``paravae_vae_for``.
        fuse: whether to call ``fuse_transformer``; None: if that takes the transformer (``Accelerated.not_fused``).

    Returns:
        What undoes it: ``.restore()``.

    Raises:
        ValueError: as ``paravae_vae_for`` and, with ``fuse``, ``fuse_transformer`` do. Nothing is changed then.
    """
    vae, original, saved_as = paravae_vae_for(pipe, vae_config, group), pipe.vae, pipe.config["vae"]
    not_fused = "fuse=False" if fuse is False else _fuse(getattr(pipe, "transformer", None), required=bool(fuse))
    pipe.vae = vae
    pipe.register_to_config(vae=saved_as)  # the saved pipeline is diffusers' own, to be loaded without paravae
    return Accelerated(pipe, vae, original, not_fused)


def _fuse(transformer: Any, *, required: bool) -> str:
    """Why ``transformer`` is not fused, if so."""
    try:
        fuse_transformer(transformer)
    except ValueError as error:
        if required:
            raise
        logger.info("the transformer is not fused: %s", error)
        return str(error)
    return ""


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)
