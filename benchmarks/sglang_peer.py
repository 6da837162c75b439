"""SGLang's own VAE class as a peer: its code, its kernels, its default quality, without its server.

`benchmarks/fetch_sglang.sh FOLDER` lays out the part of the published wheel that the VAE imports; `build` loads a
state dict of diffusers' `AutoencoderKLQwenImage` into SGLang's class the way SGLang's loader does; `sglang_import.py`
says what of SGLang is replaced. Whether its kernels really ran is not left to belief: `build` refuses a CUDA device
without the fast path, and `Peer.kernels_called` counts the launches of one decode.

    python -m benchmarks.sglang_peer FOLDER                  # equality with diffusers, small model, any machine
    python -m benchmarks.sglang_peer FOLDER --full           # full size, bfloat16: also which kernels ran

On several ranks `build(parallel=...)` sets up SGLang's own process groups by its worker's function, all ranks in one
Ulysses group as its server has them by default, and its class decodes as its `parallel_decode_mode` says.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import paravae
from benchmarks.sglang_import import GEN, MODULES, REPLACED, WITHOUT_INIT, Kind, Parts, PeerUnavailable, import_vae
from paravae.launch.machine import version_of

Precision = Literal["plain", "pipeline"]
Parallel = Literal["auto", "spatial_shard", "patch"]

_KERNELS = (
    "cat_pad_channels_last_3d",
    "conv_bias_epilogue",
    "nearest_upsample_nhwc",
    "wan_norm_silu_post",
    "wan_rmsnorm_silu",
)


@dataclass
class Peer:
    """SGLang's VAE on one device. Results have the dtype its class returns: Wan's decode gives float32."""

    vae: Any
    what_ran: str
    weights_dtype: torch.dtype
    autocast: torch.dtype | None
    _parts: Parts = field(repr=False)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Denormalised latents [B, 16, T, h, w] to pixels [B, 3, 4T-3, 8h, 8w] in [-1, 1]."""
        dtype = latents.dtype if self.autocast else self.weights_dtype
        with self._autocast(latents), self._parts.fast_path.use_vae_fast_path(self.vae, True):
            return self.vae.decode(latents.to(dtype))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] in [-1, 1] to the posterior's mean; in the weights' dtype, as SGLang encodes."""
        return self.vae.encode(pixels.to(self.weights_dtype)).mean

    def _autocast(self, like: Tensor) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(like.device.type, dtype=self.autocast)

    def kernels_called(self, latents: Tensor) -> dict[str, int]:
        """How often one decode calls each of SGLang's fused kernels (0 of all on a CPU)."""
        calls: dict[str, int] = {}
        kept: list[tuple[types.ModuleType, str, Callable[..., object]]] = []

        def counted(name: str, kernel: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                calls[name] += 1
                return kernel(*args, **kwargs)

            return call

        for module in (self._parts.optimiser, self._parts.model):
            for name in _KERNELS:
                kernel = getattr(module, name, None)
                if kernel is not None:
                    calls.setdefault(name, 0)
                    kept.append((module, name, kernel))
                    setattr(module, name, counted(name, kernel))
        try:
            self.decode(latents)
        finally:
            for module, name, kernel in kept:
                setattr(module, name, kernel)
        return calls


def build(
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    folder: Path | str,
    kind: Kind = "qwen",
    base_dim: int = 96,
    precision: Precision = "plain",
    parallel: Parallel | None = None,
    plugin: bool = False,
) -> Peer:
    """SGLang's class for `kind`, with these weights, as its loader would leave it on this device.

    `plugin`: the class with which paravae serves SGLang's Qwen-Image, through the same calls, instead.
    `parallel`: the mode in which the ranks of torchrun share its decodes; a collective call. Without it, or with one
    rank, it decodes alone.

    `qwen` is the class SGLang serves Qwen-Image with: bfloat16 weights without autocast, which is `plain`. `wan` is
    its class for Wan 2.1, the same network with more of its path fused (biases and residuals in one kernel, the
    frame interleave in channels_last_3d). Wan's pipeline decodes fp32 weights under autocast; `pipeline` does so,
    while `plain` holds the weights in `dtype`, so that both peers compute in the same precision.
    """
    device = torch.device(device)
    parts = import_vae(Path(folder).resolve(), kind)
    on_cuda = device.type == "cuda"
    if on_cuda and not parts.platform.is_cuda():
        raise PeerUnavailable(f"SGLang sees no CUDA here: its platform is {type(parts.platform).__name__}")
    if on_cuda and not parts.optimiser._HAS_TRITON:
        raise PeerUnavailable("SGLang's Triton kernels could not be imported")
    ranks = torch.distributed.get_world_size() if parallel and torch.distributed.is_initialized() else 1
    if kind == "wan" and torch.distributed.is_initialized():
        raise PeerUnavailable("SGLang's Wan class asks for its own process groups where torch.distributed is set up")
    autocast = dtype if kind == "wan" and precision == "pipeline" and dtype != torch.float32 else None
    held = torch.float32 if autocast else dtype
    try:
        if ranks > 1:
            parts.distributed.maybe_init_distributed_environment_and_model_parallel(
                tp_size=1, sp_size=ranks, ulysses_degree=ranks
            )
        vae = _loaded(parts, kind, state_dict, held, device, base_dim, parallel, plugin=plugin)
    except Exception as error:
        raise PeerUnavailable(f"SGLang's VAE could not be built: {type(error).__name__}: {error}") from error

    converted = 0
    if on_cuda:
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
                converted += 1
        vae = parts.platform.optimize_vae(vae)
    if plugin:
        how = f"{type(vae).__module__}.{type(vae).__name__} of paravae {paravae.__version__}"
        what_ran = (
            f"{how}, as SGLang {parts.version}'s loader leaves it, parallel_decode_mode={parallel}, {ranks} ranks"
        )
        return Peer(vae, what_ran, held, autocast, parts)
    norms, upsamples = _fused(parts, vae)
    if on_cuda and not (norms and upsamples and vae in parts.fast_path._VAE_FAST_PATH_GATES):
        raise PeerUnavailable("SGLang's CUDA fast path was not installed; its log says why")
    if ranks > 1 and vae._spatial_parallel_decode_enabled != (parallel == "spatial_shard"):
        raise PeerUnavailable(f"SGLang's {parallel} is not what its class was built for on {ranks} ranks")

    precise = f"{held} weights under {autocast} autocast" if autocast else f"{held} weights, no autocast"
    optimised = (
        f"{converted} Conv3d weights in channels_last_3d, {norms} fused RMSNorm+SiLU, {upsamples} channels_last "
        "upsamples, cat+pad+cache kernel"
        + (", conv bias and residual kernel" if kind == "wan" else "")
        + ", fast path on (quality lossless, SGLang's default)"
        if on_cuda
        else "none of its CUDA optimisations"
    )
    triton, diffusers = (version_of(package) or "none" for package in ("triton", "diffusers"))
    what_ran = (
        f"SGLang {parts.version}'s {type(vae).__name__} ({precise}, {optimised}; torch {torch.__version__}, "
        f"triton {triton}, diffusers {diffusers}){_shared(parallel, ranks)}; not torch.compiled, as by default; "
        f"stood in for: the __init__ of {', '.join(WITHOUT_INIT)}; {', '.join(REPLACED)}; "
        f"absent packages {', '.join(parts.stood_in) or 'none'}"
    )
    return Peer(vae, what_ran, held, autocast, parts)


def _shared(parallel: Parallel | None, ranks: int) -> str:
    """In words, how the ranks share a decode."""
    if parallel is None:
        return ""
    if ranks == 1:
        return f"; parallel_decode_mode={parallel} on one rank, which shares nothing"
    how = {
        "spatial_shard": "rows, the neighbours' edges before each convolution",
        "auto": "all on every rank",
        "patch": "rows, each rank's as a picture of its own, inexact",
    }[parallel]
    return f"; parallel_decode_mode={parallel} on {ranks} ranks, one Ulysses group ({how})"


def _loaded(
    parts: Parts,
    kind: Kind,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    base_dim: int,
    parallel: Parallel | None,
    *,
    plugin: bool,
) -> nn.Module:
    """Built on the CPU in its dtype, moved, loaded and frozen, in the order of SGLang's loader."""
    utils = sys.modules[f"{GEN}.runtime.loader.utils"]
    stem = MODULES[kind].stem
    config = getattr(parts.config, f"{stem}VAEConfig")()
    config.update_model_arch({"base_dim": base_dim, "latents_mean": (0.0,) * 16, "latents_std": (1.0,) * 16})
    config.post_init()
    if parallel is not None:
        config.parallel_decode_mode = parallel
    make = getattr(parts.model, f"AutoencoderKL{stem}")
    if plugin:
        from paravae.integrations.sglang_vae import qwen_image_vae as make
    with utils.set_default_torch_dtype(dtype):
        vae: nn.Module = make(config)
    vae = vae.to(device)
    utils.load_model_state_dict(vae, dict(state_dict), strict=True)
    return utils.finalize_loaded_model(vae)


def _fused(parts: Parts, vae: nn.Module) -> tuple[int, int]:
    found = [type(module) for module in vae.modules()]
    return found.count(parts.optimiser.FusedWanRMSNormSiLU), found.count(parts.optimiser.GatedChannelsLastUpsample)


def check(folder: Path, kind: Kind, precision: Precision, device: torch.device, full: bool) -> None:
    """Compare with diffusers' class in the same process and print what ran."""
    from diffusers import AutoencoderKLQwenImage as DiffusersVAE

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    base_dim, dtype, side = (96, torch.bfloat16, 128) if full else (16, torch.float32, 12)
    reference = DiffusersVAE(base_dim=base_dim).eval().requires_grad_(False)
    state = reference.state_dict()
    peer = build(state, dtype, device, folder=folder, kind=kind, base_dim=base_dim, precision=precision)
    print(peer.what_ran)
    reference.to(device)
    for frames in (1, 3):
        latents = torch.randn(1, 16, frames, side, side + 4, device=device)
        with torch.no_grad():
            pixels = reference.decode(latents).sample
            mean = reference.encode(pixels).latent_dist.mean
            decoded, encoded = peer.decode(latents), peer.encode(pixels)
        print(
            f"{kind} {frames} latent frames: decode {tuple(decoded.shape)} {decoded.dtype} "
            f"max error {float((decoded.float() - pixels).abs().max()):.2e} (pixel std {float(pixels.std()):.3f}), "
            f"encode max error {float((encoded.float() - mean).abs().max()):.2e} (latent std {float(mean.std()):.3f}), "
            f"kernels called {peer.kernels_called(latents)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="qwen", choices=["qwen", "wan"])
    parser.add_argument("--precision", default="plain", choices=["plain", "pipeline"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    check(args.folder, args.kind, args.precision, torch.device(args.device), args.full)


if __name__ == "__main__":
    main()
