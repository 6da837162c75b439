"""Qwen-Image through diffusers, decoded by paravae: on one rank, or on all that torchrun starts.

    python examples/qwen_image.py --output picture.png
    torchrun --nproc-per-node 2 examples/qwen_image.py --output picture.png
    torchrun --nproc-per-node 2 examples/qwen_image.py --model Qwen/Qwen-Image --steps 50 --size 1328

Without ``--model`` the pipeline is tiny and its weights random, but for the VAE's: nothing is downloaded, and the
picture shows that everything ran, no more. Needs ``pip install paravae[diffusers]``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers
from PIL.Image import Image

import paravae
from paravae.integrations.diffusers_vae import AutoencoderKLQwenImage
from paravae.integrations.driving import lead
from paravae.integrations.pipelines import accelerate

TINY_VAE = Path(paravae.__file__).parent / "assets/paravae-tiny"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WIDTH = 16  # of a text token


def tiny_tokenizer() -> transformers.Qwen2Tokenizer:
    """One token a byte, and Qwen's special ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {word: index for index, word in enumerate([*letters, *SPECIAL, *VISION])}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return transformers.Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=[*SPECIAL, *VISION])


def tiny_text_encoder(tokenizer: transformers.Qwen2Tokenizer) -> transformers.Qwen2_5_VLForConditionalGeneration:
    ends, starts, end, *vision = tokenizer.convert_tokens_to_ids([*SPECIAL, *VISION])
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "vocab_size": len(tokenizer)}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **sizes,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            "bos_token_id": starts,
            "eos_token_id": end,
            "pad_token_id": ends,
        },
        vision_config={
            "depth": 1,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
        **dict(zip(names, vision, strict=True)),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_transformer(layers: int = 2) -> diffusers.QwenImageTransformer2DModel:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=64,  # 16 latents of 2 x 2
        out_channels=16,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    ).eval()


def scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    """With what Qwen-Image's scheduler_config.json says."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def tiny_pipeline() -> diffusers.QwenImagePipeline:
    """Random, and the same in every process."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return diffusers.QwenImagePipeline(
        scheduler=scheduler(),
        vae=diffusers.AutoencoderKLQwenImage.from_pretrained(TINY_VAE),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_transformer(),
    )


def load(model: str | None, device: torch.device) -> diffusers.QwenImagePipeline:
    if model is None:
        return tiny_pipeline().to(device)
    return diffusers.QwenImagePipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)


def load_vae(model: str | None, device: torch.device, config: paravae.VAEConfig) -> AutoencoderKLQwenImage:
    """What a rank that follows needs of a pipeline."""
    if model is None:
        return AutoencoderKLQwenImage.from_pretrained(TINY_VAE, vae_config=config).to(device)
    options: dict[str, Any] = {"subfolder": "vae", "torch_dtype": torch.bfloat16}
    return AutoencoderKLQwenImage.from_pretrained(model, vae_config=config, **options).to(device)


def generate(pipe: diffusers.QwenImagePipeline, wanted: argparse.Namespace) -> Image:
    return pipe(
        wanted.prompt,
        negative_prompt=" ",
        height=wanted.size,
        width=wanted.size,
        num_inference_steps=wanted.steps,
        generator=torch.Generator().manual_seed(wanted.seed),
    ).images[0]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="An image by Qwen-Image, through diffusers and paravae.")
    parser.add_argument("--output", default="picture.png", help="the file to write, by rank 0")
    parser.add_argument("--model", help="directory or hub repository; default: tiny and random")
    parser.add_argument("--prompt", default="A cat on a windowsill, in the morning sun")
    parser.add_argument("--size", type=int, default=128, help="of the picture's sides, in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", choices=["one", "all"], default="one", help="the ranks that run the pipeline")
    return parser


def main() -> None:
    wanted = parser().parse_args()
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    config = paravae.QwenImageVAEConfig(use_parallel_decode=ranks > 1)

    if rank == 0 or wanted.drive == "all":
        pipe = load(wanted.model, device)
        vae = accelerate(pipe, vae_config=config).vae
    else:
        vae = load_vae(wanted.model, device, config)
    picture = generate(pipe, wanted) if wanted.drive == "all" else lead(vae, lambda: generate(pipe, wanted))
    if rank == 0:
        picture.save(wanted.output)
        print(f"{wanted.output}: {vae.paravae.last_choice.how}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
