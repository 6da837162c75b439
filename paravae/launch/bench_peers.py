"""Who is timed: paravae, and the peers it is held against, behind one small interface."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

import paravae
from paravae import AutoencoderKLQwenImage, VAEArchConfig
from paravae.launch.bench_errors import OURS

Tensors = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to decode and encode. Tensors are in the benched dtype, on the benched device, [B, C, T, H, W]."""

    name: str
    what_ran: str
    """A sentence for the result file: which code, in which state."""
    decode: Tensors
    """Latents [B, 16, T, h, w] -> pixels [B, 3, F, 8 h, 8 w] in [-1, 1]."""
    encode: Tensors
    """Pixels [B, 3, F, 8 h, 8 w] -> the posterior's mean [B, 16, T, h, w]."""
    alone: bool = False
    """It is one device's work: of several ranks the first does it, and the others wait."""
    tiles: Tensors | None = None
    """Of an approximate decode: the same one as its own authors give it on one device, which it is held against."""

    def call(self, what: str) -> Tensors:
        """``decode`` or ``encode``."""
        return self.decode if what == "decode" else self.encode


PeerBuilder = Callable[[VAEArchConfig, Mapping[str, Tensor], torch.dtype, torch.device], Peer]
"""(architecture, fp32 weights under the published names, dtype, device) -> the peer, loaded."""


def ours(vae: AutoencoderKLQwenImage, name: str = OURS, *, alone: bool = False) -> Peer:
    """paravae itself, by its public interface."""
    how = f"{type(vae.engine).__name__}, engine={vae.config.engine!r}"
    if vae.config.use_parallel_decode:
        how += f", use_parallel_decode, parallel_decode_mode={vae.config.parallel_decode_mode!r}"
    return Peer(
        name=name,
        what_ran=f"paravae {paravae.__version__}, {how}",
        decode=vae.decode,
        encode=lambda pixels: vae.encode(pixels).mode(),
        alone=alone,
    )


def diffusers_vae(
    arch: VAEArchConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Any, str]:
    """diffusers' own class with these weights, and its version."""
    import diffusers

    with torch.device("meta"):
        vae: Any = diffusers.AutoencoderKLQwenImage(
            base_dim=arch.base_dim,
            z_dim=arch.z_dim,
            dim_mult=list(arch.dim_mult),
            num_res_blocks=arch.num_res_blocks,
            temperal_downsample=list(arch.temperal_downsample),
            input_channels=arch.input_channels,
        )
    tensors = {key: tensor.to(device, dtype, copy=True) for key, tensor in state.items()}
    vae.load_state_dict(tensors, assign=True)
    return vae.requires_grad_(False).eval(), diffusers.__version__


def diffusers_peer(arch: VAEArchConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Peer:
    """diffusers' own class, run eagerly, as it comes."""
    vae, version = diffusers_vae(arch, state, dtype, device)
    what_ran = f"diffusers {version}, AutoencoderKLQwenImage, eager, PyTorch's default settings, no tiling"
    return Peer("diffusers", what_ran, *diffusers_calls(vae), alone=True)


def compiled_peer(arch: VAEArchConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Peer:
    """diffusers' own class with channels-last weights and its decoder and encoder compiled for each shape."""
    vae, version = diffusers_vae(arch, state, dtype, device)
    for parameter in vae.parameters():
        if parameter.dim() in (4, 5):
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
    # Every shape and every state of the frame cache is a graph of its own: the usual limit of 8 would silently
    # end in eager runs.
    torch._dynamo.config.cache_size_limit = 1024
    torch._dynamo.config.accumulated_cache_size_limit = 4096
    for half in (vae.decoder, vae.encoder):
        half.compile(dynamic=False)
    what_ran = (
        f"diffusers {version}, AutoencoderKLQwenImage, channels-last weights, decoder and encoder compiled by "
        "torch.compile(dynamic=False), no tiling"
    )
    return Peer("compile", what_ran, *diffusers_calls(vae), alone=True)


PEERS: dict[str, PeerBuilder] = {"diffusers": diffusers_peer, "compile": compiled_peer}


def check_peers(names: list[str], device: torch.device) -> None:
    """Raise ValueError, saying what to install, unless every peer in ``names`` can be built here."""
    if names and importlib.util.find_spec("diffusers") is None:
        raise ValueError(f"--peers {' '.join(names)}: diffusers is not installed; pip install 'diffusers>=0.42'")
    if "compile" not in names:
        return
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang", "g++")):
        raise ValueError(
            "--peers compile: torch.compile needs a C compiler, and neither cc, gcc, clang nor g++ is on the PATH; "
            "install one (Debian: apt-get install build-essential) or leave the peer out"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(
            "--peers compile: torch.compile needs Triton on a GPU, and it is not installed; pip install triton"
        )


def diffusers_calls(vae: Any) -> tuple[Tensors, Tensors]:
    """decode and encode of diffusers' class, without gradients."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents, return_dict=False)[0]

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return vae.encode(pixels, return_dict=False)[0].mode()

    return decode, encode


def refusing(reason: str) -> Tensors:
    """What stands for a call that a peer does not have: it says why not."""

    def refuse(_: Tensor) -> NoReturn:
        raise RuntimeError(reason)

    return refuse
