"""Decode latents through SGLang's own DecodingStage, shared by its ranks, with paravae behind it.

    torchrun --nproc-per-node 2 examples/sglang_decode.py                                         # CPU, a small model
    torchrun --nproc-per-node 4 examples/sglang_decode.py --model /models/Qwen-Image --size 1328x1328

``--model`` is a directory as Qwen/Qwen-Image is published (its model_index.json and vae/ are read), its name included;
without it paravae's own small model stands in. What this script does not know is for SGLang's parser:
``--vae-config.parallel-decode-mode patch``, ``--vae-precision fp32``. SGLang's words are the stage's, in order: flags,
process groups, loader, stage. A server does the same, and the denoising before it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import paravae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: paravae-tiny, which ships with paravae")
    parser.add_argument("--size", default="256x192", help="WIDTHxHEIGHT in pixels, multiples of 8")
    parser.add_argument("--output", type=Path, default=Path("sglang.png"), help="the picture, a PNG")
    own, for_sglang = parser.parse_known_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(name, value)  # for a start without torchrun
    with tempfile.TemporaryDirectory() as folder:
        pixels, vae = decode(own.model or stand_in(Path(folder)), for_sglang, own.size)
    if int(os.environ["RANK"]) == 0:
        levels = (255 * pixels[0, :, 0]).round().to(torch.uint8)
        Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()).save(own.output)
        how = vae.vae.last_choice.how if hasattr(vae, "vae") else "SGLang's own"
        print(f"{own.output}: {type(vae).__name__}, {how}")
    torch.distributed.destroy_process_group()


def stand_in(folder: Path) -> Path:
    """A model directory that SGLang takes for Qwen-Image, with paravae-tiny as its VAE."""
    model = folder / "Qwen-Image"
    model.mkdir()
    (model / "vae").symlink_to(Path(paravae.__file__).parent / "assets/paravae-tiny", target_is_directory=True)
    index = {
        "_class_name": "QwenImagePipeline",
        "_diffusers_version": "0.37.0",
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (model / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return model


def decode(model: Path, flags: list[str], size: str) -> tuple[torch.Tensor, Any]:
    """Random latents -> pixels [1, 3, 1, H, W] in [0, 1], on every rank; and the VAE that SGLang loaded."""
    from sglang.multimodal_gen.configs.sample.qwenimage import QwenImageSamplingParams
    from sglang.multimodal_gen.runtime.distributed import maybe_init_distributed_environment_and_model_parallel
    from sglang.multimodal_gen.runtime.loader.component_loaders.vae_loader import VAELoader
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
    from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
    from sglang.multimodal_gen.runtime.platforms.plugins import load_plugins
    from sglang.multimodal_gen.runtime.server_args import prepare_server_args, set_global_server_args

    load_plugins()  # as SGLang's workers do: here paravae registers itself
    ranks = int(os.environ["WORLD_SIZE"])
    args = prepare_server_args(["--model-path", str(model), "--num-gpus", str(ranks), *flags])
    set_global_server_args(args)
    maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=ranks, ulysses_degree=ranks)
    vae, _ = VAELoader().load(str(model / "vae"), args, "vae", "diffusers")
    width, height = (int(side) for side in size.split("x"))
    latents = torch.randn(1, 16, 1, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    sampling = QwenImageSamplingParams(prompt="", height=height, width=width)
    request = Req(sampling_params=sampling, latents=latents.to(next(vae.parameters()).dtype))
    return DecodingStage(vae)(request, args).output.float(), vae


if __name__ == "__main__":
    main()
