"""Tells SGLang's model registry to decode Qwen-Image and Wan 2.1 with paravae. Registration only: no model, no CUDA.

SGLang calls ``register`` by the entry point ``sglang.multimodal_gen.plugins``, in the parent and in every worker; or
imports this module, where SGLANG_EXTERNAL_MODEL_PACKAGE names it. docs/sglang.md is the user's page.
"""

from __future__ import annotations

import os
from importlib import metadata

from sglang.multimodal_gen.runtime.models.registry import ModelRegistry
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

logger = init_logger(__name__)

SGLANG_VERSION = "0.5.23"
OFF_SWITCH = "PARAVAE_SGLANG"
# Imported by SGLang when a checkpoint asks for it, in the process that loads it.
MODELS = {
    "AutoencoderKLQwenImage": "paravae.integrations.sglang_vae:qwen_image_vae",
    "AutoencoderKLWan": "paravae.integrations.sglang_vae:wan_vae",
}


def register() -> None:
    """Put paravae's VAEs in place of SGLang's. Calling it again changes nothing; PARAVAE_SGLANG=0 keeps SGLang's.

    In a server's processes SGLang sets its log up after this, so that only the warnings show; the VAEs say themselves
    who serves when they are made.
    """
    if os.environ.get(OFF_SWITCH, "1").strip().lower() in ("0", "false", "off", "no"):
        logger.warning("paravae: off (%s=%s); SGLang's own VAEs serve", OFF_SWITCH, os.environ[OFF_SWITCH])
        return
    found = metadata.version("sglang")
    if found != SGLANG_VERSION:
        logger.warning(
            "paravae: made for SGLang %s, this is %s, with which it was not tried; %s=0 turns it off",
            SGLANG_VERSION,
            found,
            OFF_SWITCH,
        )
    new = [arch for arch, target in MODELS.items() if _target_of(arch) != target]
    for arch in new:
        # taken out first: SGLang would warn of overwriting, which is what a user who installed paravae asked for
        ModelRegistry.registered_models.pop(arch, None)
        ModelRegistry.register_model(arch, MODELS[arch])
    if new:
        logger.info("paravae: serves %s (%s=0 turns it off)", " and ".join(new), OFF_SWITCH)


def _target_of(arch: str) -> str:
    """Where the registry would import ``arch`` from, "module:name"; of a class that is imported already, nothing."""
    model = ModelRegistry.registered_models.get(arch)
    return f"{getattr(model, 'module_name', '')}:{getattr(model, 'class_name', '')}"


if os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE") == __name__:
    register()
