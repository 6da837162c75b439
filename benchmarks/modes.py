"""Time and error of every decode mode of the full-size model, on one rank or under torchrun.

    python -m benchmarks.modes --output FILE.json
    torchrun --nproc-per-node 4 -m benchmarks.modes --size 1024x1024 --dtype bfloat16 --output FILE.json

The weights are random (base_dim 96, seed 0), so no checkpoint is needed and times are those of the published
model. Each mode is compared with the same mode in fp32 (TF32 off), on one rank, and beside it stands diffusers'
own class, in the same dtype and with the same weights, against its own fp32 decode.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage as DiffusersVAE
from torch import Tensor

from paravae import AutoencoderKLQwenImage, QwenImageVAEConfig
from paravae.configs.base import ENGINES
from paravae.launch.bench_timing import largest, spread
from paravae.launch.errors import leave_at_once
from paravae.launch.machine import describe
from paravae.launch.world import World, place_from_environment, world

MODES = ("single", "patch", "tiled", "auto")


def random_vae() -> DiffusersVAE:
    """The full-size model with seeded weights whose pictures fill the range without being clamped much."""
    torch.manual_seed(0)
    vae = DiffusersVAE().eval().requires_grad_(False)
    vae.decoder.conv_out.weight *= 2.5
    return vae


def decoder_of(mode: str, vae: AutoencoderKLQwenImage) -> Callable[[Tensor], Tensor]:
    if mode == "tiled":
        return vae.parallel_tiled_decode
    if mode == "patch":
        return vae.parallel_patch_decode
    return vae.decode


def wall_ms(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Wall times of calls in ms, the device drained before and after each."""

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats):
        drain()
        start = time.perf_counter()
        run()
        drain()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def errors(out: Tensor, reference: Tensor) -> dict[str, float]:
    difference = out.double() - reference.double()
    return {"max_error": float(difference.abs().max()), "rms_error": float(difference.square().mean().sqrt())}


def measure(decode: Callable[[], Tensor], reference: Tensor, repeats: int, here: World) -> dict[str, object]:
    """One row: checked first, then timed; peak memory over what was there before."""
    cuda = here.device.type == "cuda"
    decode()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    out = decode()
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    found = errors(out, reference)
    del out
    times = spread(wall_ms(decode, repeats, here.device))
    times["ms"] = largest("ms", times["ms"], here.group)
    return {**times, **found, "peak_gib": round(peak / 2**30, 3) if cuda else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1024x1024", help="width x height in pixels")
    parser.add_argument("--frames", type=int, default=1, help="latent frames")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--engine", default="auto", choices=ENGINES, help="as the config's field")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    place = place_from_environment(os.environ)
    with world(place) as here:
        report = run(args, here)
        if here.rank == 0:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            print(json.dumps(report, indent=2))
    if place.size > 1:
        leave_at_once(0)


def run(args: argparse.Namespace, here: World) -> dict[str, object]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dtype = getattr(torch, args.dtype)
    width, height = (int(side) for side in args.size.split("x"))
    shape = (1, 16, args.frames, height // 8, width // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(here.device)

    peer = random_vae()
    alone = QwenImageVAEConfig(engine=args.engine)
    shared = replace(alone, use_parallel_decode=True)
    vae = AutoencoderKLQwenImage(alone)
    vae.load_state_dict(peer.state_dict())
    vae.to(here.device)
    exact = vae.decode(latents)
    references = {mode: vae.tiled_decode(latents) if mode == "tiled" else exact for mode in MODES}
    peer.to(here.device)
    with torch.no_grad():
        peer_exact = peer.decode(latents).sample
        peer_tiled = peer.tiled_decode(latents).sample
        fp32_gap = errors(exact, peer_exact)
    peer.to(dtype)
    vae.to(dtype)
    narrow = latents.to(dtype)

    rows = []
    with torch.no_grad():
        for mode in MODES:
            vae.config = alone if mode == "single" else shared
            decode = decoder_of(mode, vae)
            row = measure(lambda decode=decode: decode(narrow), references[mode], args.repeats, here)  # type: ignore[misc]
            assert vae.last_choice is not None
            rows.append(
                {"who": "paravae", "mode": mode, "ran": vae.last_choice.mode, "grid": vae.last_choice.grid, **row}
            )
        row = measure(lambda: peer.decode(narrow).sample, peer_exact, args.repeats, here)
        rows.append({"who": "diffusers", "mode": "eager", **row})
        row = measure(lambda: peer.tiled_decode(narrow).sample, peer_tiled, args.repeats, here)
        rows.append({"who": "diffusers", "mode": "tiled", **row})
    return {
        "what": "decode of the full-size model, random weights",
        "machine": describe(here.size),
        "size": args.size,
        "lat_frames": args.frames,
        "dtype": args.dtype,
        "engine": args.engine,
        "unit": "ms: median wall time of the slowest rank; errors against fp32, pixels in [-1, 1]",
        "pixel_std": round(float(exact.std()), 4),
        "fp32_paravae_against_diffusers": fp32_gap,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
