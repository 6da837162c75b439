"""Random crops of photographs as training batches: lone frames, and clips of a window that moves over a picture."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from paravae.vae.pixels import from_uint8


def load_pictures(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Every JPEG of ``folder`` by name, uint8 [3, H, W] on ``device``."""
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise SystemExit(f"{folder} holds no .jpg pictures; make them with python -m training.pictures")
    return {f.name: torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1).to(device) for f in files}


def _random_cut(picture: Tensor, side_px: int, rng: random.Random) -> Tensor:
    """A square of at least ``side_px`` where the picture has it, up to 2.5 times that, cut at random: [3, S, S]."""
    height, width = picture.shape[-2:]
    largest = min(height, width, int(2.5 * side_px))
    size = rng.randint(min(side_px, largest), largest)
    top, left = rng.randint(0, height - size), rng.randint(0, width - size)
    return picture[:, top : top + size, left : left + size]


def _augment(x: Tensor, rng: random.Random) -> Tensor:
    """Mirror, turn by a quarter, and now and then shuffle the colours or change the contrast of [..., H, W]."""
    if rng.random() < 0.5:
        x = x.flip(-1)
    if rng.random() < 0.25:
        x = x.transpose(-1, -2)
    if rng.random() < 0.2:
        order = list(range(3))
        rng.shuffle(order)
        x = x[order]
    if rng.random() < 0.2:
        x = (x * rng.uniform(0.6, 1.4) + rng.uniform(-0.2, 0.2)).clamp(-1, 1)
    return x


def image_batch(pictures: list[Tensor], batch: int, side_px: int, rng: random.Random) -> Tensor:
    """[batch, 3, 1, side_px, side_px] in [-1, 1]."""
    crops = []
    for picture in rng.choices(pictures, k=batch):
        cut = from_uint8(_random_cut(picture, side_px, rng))[None]
        cut = F.interpolate(cut, (side_px, side_px), mode="bilinear", antialias=True, align_corners=False)[0]
        crops.append(_augment(cut, rng))
    return torch.stack(crops)[:, :, None]


def clip_batch(pictures: list[Tensor], batch: int, frames: int, side_px: int, rng: random.Random) -> Tensor:
    """[batch, 3, frames, side_px, side_px] in [-1, 1]: a window that pans, turns and zooms over a picture."""
    clips = []
    for picture in rng.choices(pictures, k=batch):
        cut = _augment(from_uint8(_random_cut(picture, int(1.5 * side_px), rng)), rng)
        cut = F.interpolate(cut[None], (int(1.5 * side_px),) * 2, mode="bilinear", antialias=True, align_corners=False)
        steps = torch.linspace(0, 1, frames, device=picture.device)
        zoom = rng.uniform(0.5, 0.65) * (1 + steps * rng.uniform(-0.15, 0.15))
        angle = steps * rng.uniform(-0.2, 0.2)
        shift_x, shift_y = (rng.uniform(-0.3, 0.3) * (1 - 2 * steps) for _ in range(2))
        cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
        theta = torch.stack([torch.stack([cos, -sin, shift_x], -1), torch.stack([sin, cos, shift_y], -1)], 1)
        grid = F.affine_grid(theta, [frames, 3, side_px, side_px], align_corners=False)
        moved = F.grid_sample(cut.expand(frames, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
        clips.append(moved.transpose(0, 1))
    return torch.stack(clips)
