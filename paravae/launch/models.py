"""The model that a command works with, and the flags that name it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import paravae
from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig, VAEConfig
from paravae.configs.cli import add_vae_flags
from paravae.launch.world import DEVICES

TINY = Path(paravae.__file__).parent / "assets" / "paravae-tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model, where and how it runs."""
    add_checkpoint_flags(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: float32)")
    add_device_flag(parser)
    add_vae_flags(parser, QwenImageVAEConfig)


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        default=str(TINY),
        help="checkpoint in diffusers' layout: a directory or a Hugging Face repository (default: the paravae-tiny "
        "that is shipped with paravae)",
    )
    parser.add_argument("--subfolder", help="folder of the checkpoint within --model, such as vae")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to run (default: auto, the GPU if there is one)"
    )


def load_model(args: argparse.Namespace, config: VAEConfig, device: torch.device) -> AutoencoderKLQwenImage:
    """The model that the flags name, on ``device``."""
    return AutoencoderKLQwenImage.from_pretrained(
        args.model, subfolder=args.subfolder, torch_dtype=DTYPES[args.dtype], device=device, vae_config=config
    )
