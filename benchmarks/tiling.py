"""How near a tiled decode comes to the untiled one: paravae's tiles against diffusers', same weights, same latents.

    python -m benchmarks.tiling --output benchmarks/results/tiling.json

Runs in fp32 (TF32 off) with paravae-tiny, on photographs that scikit-image, scikit-learn and matplotlib ship.
Work is counted in latents decoded, the sum of the tiles' areas: every tile goes through the same network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage as DiffusersVAE
from matplotlib.cbook import get_sample_data
from PIL import Image
from skimage import data as skimage_data
from sklearn.datasets import load_sample_image

from paravae import AutoencoderKLQwenImage
from paravae.launch.machine import describe
from paravae.launch.models import TINY
from paravae.vae.pixels import from_uint8, psnr_db
from paravae.vae.plan import plan_tiles

TILE, STRIDE = 32, 24  # latents: the default 256 and 192 pixels


def photographs() -> dict[str, np.ndarray]:
    """RGB arrays [H, W, 3] by name; the last one enlarged to 1024 x 1024."""
    astronaut = skimage_data.astronaut()
    return {
        "scikit-learn flower": load_sample_image("flower.jpg"),
        "scikit-learn china": load_sample_image("china.jpg"),
        "matplotlib grace_hopper": np.array(
            Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
        ),
        "scikit-image coffee": skimage_data.coffee(),
        "scikit-image astronaut": astronaut,
        "scikit-image astronaut, twice the size": np.array(Image.fromarray(astronaut).resize((1024, 1024), 3)),
    }


def diffusers_work(height: int, width: int) -> int:
    """Latents that diffusers' grid decodes: a tile at every stride, cut off at the border."""

    def covered(size: int) -> int:
        return sum(min(TILE, size - start) for start in range(0, size, STRIDE))

    return covered(height) * covered(width)


@torch.no_grad()
def compare(name: str, picture: np.ndarray, ours: AutoencoderKLQwenImage, theirs: DiffusersVAE) -> dict[str, object]:
    height, width = (side // 8 * 8 for side in picture.shape[:2])
    levels = torch.from_numpy(picture[:height, :width].copy()).permute(2, 0, 1)[None, :, None]
    latents = ours.encode(from_uint8(levels).to(ours.device)).mode()
    untiled = ours.decode(latents)
    plan = plan_tiles((latents.shape[-2], latents.shape[-1]), (TILE, TILE), (STRIDE, STRIDE))
    return {
        "picture": name,
        "size": f"{width}x{height}",
        "psnr_db": round(psnr_db(ours.tiled_decode(latents), untiled, 2), 2),
        "diffusers_psnr_db": round(psnr_db(theirs.tiled_decode(latents).sample.clamp(-1, 1), untiled, 2), 2),
        "tiles": len(plan.tiles),
        "latents_decoded": sum(tile.area for tile in plan.tiles),
        "diffusers_latents_decoded": diffusers_work(*latents.shape[-2:]),
        "latents": latents.shape[-2] * latents.shape[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = AutoencoderKLQwenImage.from_pretrained(TINY, device=device)
    arch = ours.config.arch_config
    theirs = DiffusersVAE(base_dim=arch.base_dim).eval().to(device)
    theirs.load_state_dict(ours.state_dict())
    rows = [compare(name, picture, ours, theirs) for name, picture in photographs().items()]
    report = {"what": "tiled against untiled decode, paravae-tiny, fp32", "machine": describe(1), "rows": rows}
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
