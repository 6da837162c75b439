"""Train paravae-tiny: the Qwen-Image VAE's architecture at base_dim 16, small enough to ship in the package.

It gives the demo, the tests and every seam something real to show; it is not the product. Images teach the
spatial weights, moving windows over pictures the temporal ones.

    python -m training.pictures --output .photos
    python -m training.train_tiny --pictures .photos --output paravae/assets/paravae-tiny --minutes 8
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from paravae import AutoencoderKLQwenImage, QwenImageVAEArchConfig, QwenImageVAEConfig
from paravae.vae import plan
from paravae.vae.models import checkpoint
from paravae.vae.models.blocks import CausalConv3d, FrameCache
from paravae.vae.models.stage import run_local
from paravae.vae.pixels import from_uint8, psnr_db
from training.crops import clip_batch, image_batch, load_pictures
from training.muon import Muon

MUON_LEARNING_RATE = 0.012  # peak, for convolution weights
ADAM_LEARNING_RATE = 3e-3  # peak, for biases and norms
KL_WEIGHT = 1e-6
EMA_DECAY = 0.998
CLIP_EVERY = 4  # every so many steps a batch of clips in place of images
LARGE_EVERY = 6  # every so many steps a few images of twice the side, so that the attention meets more tokens
HELD_OUT_SIDE_PX = 512


def new_vae(base_dim: int) -> AutoencoderKLQwenImage:
    """Random weights that start as an image model: unit gain in space, little noise in the latents, past frames
    weighing nothing, time convolutions copying."""
    arch = QwenImageVAEArchConfig(base_dim=base_dim, latents_mean=(), latents_std=())
    vae = AutoencoderKLQwenImage(QwenImageVAEConfig(arch_config=arch))
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d):
            continue
        assert module.bias is not None
        module.bias.data.zero_()
        weight = module.weight.data.zero_()
        if name.endswith("time_conv"):
            outputs, inputs = weight.shape[:2]
            weight[torch.arange(outputs), torch.arange(outputs) % inputs, -1] = 1
        else:
            present = weight[:, :, -1] if isinstance(module, CausalConv3d) else weight
            gain = 0.5 if name.endswith("conv2") else 1.0
            present.normal_(std=gain / math.sqrt(present[0].numel()))
    assert vae.quant_conv is not None
    assert vae.quant_conv.bias is not None
    vae.quant_conv.weight.data[arch.z_dim :] *= 0.1
    vae.quant_conv.bias.data[arch.z_dim :] = -8  # log-variance
    return vae.requires_grad_(True)


def encode(vae: AutoencoderKLQwenImage, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the latents, with gradients."""
    trace = plan.whole(vae.engine.encoder_stages, *pixels.shape[-2:])
    features = torch.cat(list(vae.engine.encode_window(pixels, trace)), dim=2)
    mean, logvar = vae.engine.encode_features(features).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Pixels, with gradients, and not clamped as a decode would: a clamped pixel could never be mended."""
    assert vae.decoder is not None
    assert vae.post_quant_conv is not None
    trace = plan.whole(vae.engine.decoder_stages, *latents.shape[-2:])
    cache: FrameCache | None = {} if latents.shape[2] > 1 else None
    frames = vae.post_quant_conv(latents).split(1, dim=2)
    stages = vae.decoder.tail()
    return torch.cat([run_local(stages, vae.decoder.head(z, cache), trace, cache) for z in frames], dim=2).float()


def loss_of(vae: AutoencoderKLQwenImage, pixels: Tensor) -> Tensor:
    mean, logvar = encode(vae, pixels)
    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    error = decode(vae, latents) - pixels
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
    return error.abs().mean() + 10 * error.square().mean() + KL_WEIGHT * kl


def schedule(step: int, done: float) -> float:
    """Fraction of the peak learning rate: warm-up over 100 steps, then a cosine down to a hundredth;
    ``done``: the fraction of training behind us."""
    return min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1))))


def train(
    vae: AutoencoderKLQwenImage, pictures: list[Tensor], args: argparse.Namespace
) -> tuple[int, dict[str, Tensor]]:
    """Train for ``args.minutes``; gives the steps taken and the averaged weights."""
    rng = random.Random(0)
    weights = [p for name, p in vae.named_parameters() if name.endswith("weight")]
    others = [p for name, p in vae.named_parameters() if not name.endswith("weight")]
    muon = Muon(weights)
    adam = torch.optim.Adam(others, betas=(0.9, 0.98), fused=args.device == "cuda")
    average = {name: tensor.detach().clone() for name, tensor in vae.state_dict().items()}
    started, step, running = time.monotonic(), 0, torch.zeros((), device=args.device)
    while (done := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        muon.param_groups[0]["lr"] = MUON_LEARNING_RATE * schedule(step, done)
        adam.param_groups[0]["lr"] = ADAM_LEARNING_RATE * schedule(step, done)
        if step % CLIP_EVERY == CLIP_EVERY - 1:
            pixels = clip_batch(pictures, max(1, args.batch // 8), 9, args.side_px, rng)
        elif step % LARGE_EVERY == LARGE_EVERY - 1:
            pixels = image_batch(pictures, max(1, args.batch // 4), 2 * args.side_px, rng)
        else:
            pixels = image_batch(pictures, args.batch, args.side_px, rng)
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(vae, pixels)
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        muon.step()
        adam.step()
        now = vae.state_dict()
        torch._foreach_lerp_(
            list(average.values()), [now[name] for name in average], 1 - min(EMA_DECAY, step / (step + 20))
        )
        step += 1
        running += 0.01 * (loss.detach() - running)
        if step % 200 == 0:
            print(f"{step} steps, {time.monotonic() - started:.0f} s, loss {float(running):.4f}", flush=True)
    return step, average


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLQwenImage, pictures: list[Tensor]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each latent channel over crops of the training pictures, to four decimals."""
    rng = random.Random(1)
    latents = torch.cat([encode(vae, image_batch(pictures, 8, 256, rng))[0] for _ in range(16)])
    by_channel = latents.transpose(0, 1).flatten(1)
    return tuple(round(v, 4) for v in by_channel.mean(1).tolist()), tuple(
        round(v, 4) for v in by_channel.std(1).tolist()
    )


def middle(picture: Tensor) -> Tensor:
    """The central 512 x 512 of a picture, less where it is smaller, in multiples of 8: [1, 3, 1, H, W] in [-1, 1]."""
    height, width = (min(side, HELD_OUT_SIDE_PX) // 8 * 8 for side in picture.shape[-2:])
    top, left = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
    return from_uint8(picture[:, top : top + height, left : left + width])[None, :, None]


def measure(vae: AutoencoderKLQwenImage, held_out: dict[str, Tensor]) -> list[dict[str, object]]:
    """PSNR of encode and decode of each held-out picture, in dB."""
    rows: list[dict[str, object]] = []
    for name, picture in held_out.items():
        pixels = middle(picture)
        decoded = vae.decode(vae.encode(pixels).mode())
        size = f"{pixels.shape[-1]}x{pixels.shape[-2]}"
        rows.append({"picture": name, "size": size, "psnr_db": round(psnr_db(decoded, pixels, 2), 2)})
    return rows


@torch.no_grad()
def measure_clip(vae: AutoencoderKLQwenImage, held_out: dict[str, Tensor]) -> float:
    """PSNR of moving windows over the held-out pictures, 9 frames of 256 x 256, in dB."""
    pixels = clip_batch(list(held_out.values()), 8, 9, 256, random.Random(2))
    return round(psnr_db(vae.decode(vae.encode(pixels).mode()), pixels, 2), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder made by training.pictures")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--report", type=Path, help="JSON file to write data, steps and PSNR to")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long to train")
    parser.add_argument("--batch", type=int, default=32, help="image crops a step")
    parser.add_argument("--side-px", type=int, default=128, help="side of a crop, in pixels, a multiple of 8")
    parser.add_argument("--base-dim", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True

    device = torch.device(args.device)
    train_set = load_pictures(args.pictures / "train", device)
    held_out = load_pictures(args.pictures / "heldout", device)
    vae = new_vae(args.base_dim).to(device)
    steps, average = train(vae, list(train_set.values()), args)

    stored = {name: tensor.half() for name, tensor in average.items()}  # what ships, and so what is measured
    vae.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    vae.requires_grad_(False).eval()
    torch.backends.cudnn.benchmark = False
    mean, std = latent_statistics(vae, list(train_set.values()))
    arch = replace(vae.config.arch_config, latents_mean=mean, latents_std=std)
    checkpoint.save(args.output, type(vae).__name__, arch, stored)

    rows = measure(vae, held_out)
    large = [float(row["psnr_db"]) for row in rows if row["size"] == f"{HELD_OUT_SIDE_PX}x{HELD_OUT_SIDE_PX}"]  # type: ignore[arg-type]
    report = {
        "base_dim": args.base_dim,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "data": "python -m training.pictures: photographs of the packages that training/pictures.py lists",
        "train_pictures": len(train_set),
        "steps": steps,
        "batch": args.batch,
        "side_px": args.side_px,
        "minutes": args.minutes,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "psnr_db_512": {
            "mean": round(sum(large) / max(len(large), 1), 2),
            "least": min(large, default=None),
            "pictures": len(large),
        },
        "psnr_db_clips": measure_clip(vae, held_out),
        "held_out": rows,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.report:
        args.report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
