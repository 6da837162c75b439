"""A VAE of paravae's that runs on the very weights of one of diffusers', or one error that says why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from paravae.configs import QwenImageVAEConfig, VAEConfig, WanVAEConfig
from paravae.vae import autoencoders
from paravae.vae.models.checkpoint import arch_of, mismatch

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KINDS: dict[str, tuple[type[autoencoders.AutoencoderKLQwenImage], type[VAEConfig]]] = {
    "AutoencoderKLQwenImage": (autoencoders.AutoencoderKLQwenImage, QwenImageVAEConfig),
    "AutoencoderKLWan": (autoencoders.AutoencoderKLWan, WanVAEConfig),
}


def vae_on_weights_of(theirs: nn.Module, vae_config: VAEConfig | None) -> autoencoders.AutoencoderKLQwenImage:
    """The same network on the same parameters: nothing is copied, and what moves or casts one does so to both.

    Args:
        theirs: diffusers' AutoencoderKLQwenImage, or AutoencoderKLWan of Wan 2.1.
        vae_config: how to run it; its ``arch_config`` gives way to what ``theirs`` says. Default: alone, untiled.

    Raises:
        ValueError: another model, or weights that are not there, quantized, or put elsewhere by hooks.
    """
    name = type(theirs).__name__
    if name not in _KINDS or not type(theirs).__module__.startswith("diffusers."):
        raise ValueError(
            f"the pipeline's vae is a {type(theirs).__module__}.{name}, need diffusers' {' or '.join(_KINDS)}: other "
            "VAEs are other networks, and one that was compiled, wrapped or accelerated is to be given as it was before"
        )
    kind, config_class = _KINDS[name]
    vae_config = vae_config or config_class()
    if not isinstance(vae_config, VAEConfig):
        raise ValueError(f"vae_config is a {type(vae_config).__name__}, needs a {config_class.__name__}")
    stated: Mapping[str, Any] = {**dict(theirs.config), "_class_name": name}  # type: ignore[arg-type]
    arch = arch_of(stated, f"pipe.vae.config ({name})", type(vae_config.arch_config))
    _check_weights(theirs)
    with torch.device("meta"):
        vae = kind(replace(vae_config, arch_config=arch))
    _share(vae, theirs)
    return vae.eval()


def _check_weights(theirs: nn.Module) -> None:
    weights = dict(theirs.named_parameters())
    hooked = [name or "the VAE itself" for name, module in theirs.named_modules() if _has_hooks(module)]
    if hooked:
        raise ValueError(
            f"pipe.vae has hooks ({hooked[0]}, {len(hooked)} in all), which would not run: accelerate the pipeline "
            "before enable_model_cpu_offload and other hooks; pipe.remove_all_hooks() takes those of offloading off"
        )
    quantized = [name for name, weight in weights.items() if type(weight) is not nn.Parameter]
    if quantized or getattr(theirs, "hf_quantizer", None) is not None:
        raise ValueError(f"pipe.vae is quantized (such as {quantized[:2]}): load it without a quantization config")
    missing = [name for name, weight in weights.items() if weight.is_meta]
    if missing:
        raise ValueError(
            f"{len(missing)} weights of pipe.vae are on the meta device (such as {missing[0]}): load them first, and "
            "accelerate before enable_sequential_cpu_offload"
        )
    for what in ("dtype", "device"):
        found = sorted({str(getattr(weight, what)) for weight in weights.values()})
        if len(found) > 1:
            raise ValueError(f"the weights of pipe.vae are of several {what}s ({', '.join(found)}): pipe.vae.to(one)")
    dtype = next(iter(weights.values())).dtype
    if dtype not in _FLOATS:
        raise ValueError(f"the weights of pipe.vae are {dtype}, need one of {', '.join(map(str, _FLOATS))}")


def _has_hooks(module: nn.Module) -> bool:
    """Of accelerate, of diffusers (group offloading, layerwise casting), or of PyTorch."""
    return hasattr(module, "_hf_hook") or bool(
        getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        or module._forward_hooks
        or module._forward_pre_hooks
    )


def _share(vae: nn.Module, theirs: nn.Module) -> None:
    weights = theirs.state_dict(keep_vars=True)
    named = dict(vae.named_parameters())
    missing, foreign, misshapen = mismatch(named, weights)
    wrong = [*missing, *misshapen]
    if wrong or foreign:
        raise ValueError(
            f"pipe.vae has other weights than its config says: {len(wrong)} missing or misshapen (such as "
            f"{wrong[:2]}), {len(foreign)} unknown (such as {foreign[:2]}); take adapters off first"
        )
    for name, weight in named.items():
        weight.requires_grad_(weights[name].requires_grad)  # or loading would change theirs
    vae.load_state_dict({name: weights[name] for name in named}, assign=True)
