"""diffusers' own pipelines, with small random parts that are the same in every process, and what they make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.builders import noise, perturb

diffusers = pytest.importorskip("diffusers", reason="needs paravae[diffusers]")
pytest.importorskip("transformers", reason="needs paravae[diffusers]")

from examples import qwen_image  # noqa: E402

Pipeline = Any
KINDS = ("text to image", "image to image", "inpaint", "edit", "edit plus", "video", "video to video")
_QWEN = {
    "image to image": "QwenImageImg2ImgPipeline",
    "inpaint": "QwenImageInpaintPipeline",
    "edit": "QwenImageEditPipeline",
    "edit plus": "QwenImageEditPlusPipeline",
}
_WAN = {"video": "WanPipeline", "video to video": "WanVideoToVideoPipeline"}


def qwen_vae(**fields: Any) -> Any:
    """diffusers' own, small and random."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(**{"base_dim": 8, **fields})
    perturb(vae)
    return vae.eval()


def wan_vae(**fields: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(**{"base_dim": 8, **fields})
    perturb(vae)
    return vae.eval()


def pipeline(kind: str = "text to image") -> Pipeline:
    """diffusers' pipeline of that kind, as diffusers makes it. Only that of text to image has a text encoder."""
    if kind in _WAN:
        made = _wan(kind)
    elif kind == "text to image":
        made = qwen_image.tiny_pipeline()
    else:
        torch.manual_seed(0)
        parts = {"transformer": qwen_image.tiny_transformer(), "text_encoder": None, "tokenizer": None}
        if kind.startswith("edit"):
            parts["processor"] = None
        made = getattr(diffusers, _QWEN[kind])(vae=qwen_vae(), scheduler=qwen_image.scheduler(), **parts)
    made.set_progress_bar_config(disable=True)
    return made


def _wan(kind: str) -> Pipeline:
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts = {"tokenizer": None, "text_encoder": None, "transformer": transformer}
    return getattr(diffusers, _WAN[kind])(vae=wan_vae(), scheduler=scheduler, **parts)


def picture(pipe: Pipeline, kind: str = "text to image", seed: int = 0, **options: Any) -> Tensor:
    """What ``pipe`` makes, [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]: two steps, the same noise each time."""
    embeds = noise(1, 5, qwen_image.WIDTH, dtype=pipe.transformer.dtype)
    given: dict[str, Any] = {"height": 48, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    if kind in _WAN:
        given |= {"prompt_embeds": embeds, "guidance_scale": 1.0}
        if kind == "video":
            given |= {"num_frames": 5}
        else:
            given |= {"video": [_drawn(frame) for frame in range(5)], "strength": 1.0}
    elif kind == "text to image":
        given |= {"prompt": "a cat", "negative_prompt": "a dog"}
    else:
        given |= {"prompt_embeds": embeds, "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long), "image": _drawn(0)}
        given |= {"true_cfg_scale": 1.0}
        if kind == "inpaint":
            given |= {"mask_image": _drawn(1).convert("L")}
    given |= {"generator": torch.Generator().manual_seed(seed), **options}
    made = pipe(**given)
    found = made.frames if kind in _WAN else made.images
    return found.clone()


def _drawn(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((64, 48), Image.Resampling.BICUBIC)
