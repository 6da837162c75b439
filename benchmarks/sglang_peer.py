"""SGLang's own VAE class as a peer: its code, its kernels, its default quality, without its server.

`benchmarks/fetch_sglang.sh FOLDER` lays out the part of the published wheel that the VAE imports; `build` loads a
state dict of diffusers' `AutoencoderKLQwenImage` into SGLang's class the way SGLang's loader does. What is replaced
here is only what never computes a pixel: the `__init__` files that would import the server, packages of the server
that are not installed, and the fast paths of other VAEs. Whether its kernels really ran is not left to belief:
`build` refuses a CUDA device without the fast path, and `Peer.kernels_called` counts the launches of one decode.

    python -m benchmarks.sglang_peer FOLDER                  # equality with diffusers, small model, any machine
    python -m benchmarks.sglang_peer FOLDER --full           # full size, bfloat16: also which kernels ran
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Kind = Literal["qwen", "wan"]
Precision = Literal["plain", "pipeline"]

_GEN = "sglang.multimodal_gen"
_VAES = f"{_GEN}.runtime.models.vaes"

# Packages whose __init__ imports the server; where their names are asked for, they come from the module beside.
_WITHOUT_INIT: dict[str, str | None] = {
    "sglang": None,
    "sglang.srt.utils": "sglang.srt.utils.common",
    "sglang.kernels": None,
    "sglang.kernels.ops": None,
    _GEN: None,
    f"{_GEN}.configs.models": f"{_GEN}.configs.models.vaes.base",
    f"{_GEN}.runtime.cache": None,
}


def _unchanged(vae: nn.Module) -> nn.Module:
    return vae


# Modules of SGLang replaced whole: a type used in annotations, and the installers of other VAEs' fast paths, which
# return a Wan or Qwen-Image VAE as it is but import what their own models need.
_REPLACED: dict[str, dict[str, object]] = {
    f"{_GEN}.runtime.server_args": {"ServerArgs": object},
    f"{_VAES}.flux2_vae_cuda_opt": {
        "maybe_optimize_autoencoder_kl": _unchanged,
        "maybe_optimize_flux2_vae": _unchanged,
    },
    f"{_VAES}.minimax_h3_vae_cuda_opt": {"maybe_optimize_minimax_h3_vae": _unchanged},
    f"{_VAES}.qwen_image21_vae_cuda_opt": {"maybe_optimize_qwen_image21_vae": _unchanged},
}

# The server's transport and serialisation, imported at the head of utility modules; stood in for only where absent.
_SERVER_ONLY = frozenset({"orjson", "pybase64", "pydantic_core", "starlette", "zmq"})


class _Names(NamedTuple):
    model: str
    config: str
    stem: str


_MODULES: dict[Kind, _Names] = {
    "qwen": _Names("autoencoder_kl_qwenimage", "qwenimage", "QwenImage"),
    "wan": _Names("wanvae", "wanvae", "Wan"),
}

_KERNELS = (
    "cat_pad_channels_last_3d",
    "conv_bias_epilogue",
    "nearest_upsample_nhwc",
    "wan_norm_silu_post",
    "wan_rmsnorm_silu",
)


class PeerUnavailable(RuntimeError):  # noqa: N818
    """SGLang's VAE cannot be set up here; the message says why."""


class _StandIn(types.ModuleType):
    """A module nothing on the VAE's path calls: its attributes exist, and cannot be used."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> None:
            raise PeerUnavailable(f"{self.__name__}.{name} was called, and is only stood in for")

        made = type(name, (), {"__init__": refuse})
        setattr(self, name, made)
        return made


class _SGLangFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives SGLang's packages without their `__init__`, and the modules of `_REPLACED`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in _WITHOUT_INIT:
            spec = importlib.machinery.ModuleSpec(fullname, self, is_package=True)
            spec.submodule_search_locations = [str(self.folder.joinpath(*fullname.split(".")))]
            return spec
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _REPLACED else None

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        if name in _REPLACED:
            vars(module).update(_REPLACED[name])
            return
        source = _WITHOUT_INIT[name]

        def lookup(attribute: str) -> object:
            if source is None or attribute.startswith("__"):
                raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
            return getattr(importlib.import_module(source), attribute)

        vars(module)["__getattr__"] = lookup


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last of all: stands in for the server's packages that this machine lacks."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in _SERVER_ONLY:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        self.made.append(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def _stand_ins() -> Iterator[list[str]]:
    """Stand-ins while SGLang is imported, and gone after: other libraries must not take them for the packages."""
    finder = _AbsentFinder()
    sys.meta_path.append(finder)
    try:
        yield finder.made
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


@dataclass(frozen=True)
class _Parts:
    """What `build` needs of SGLang, imported."""

    model: types.ModuleType
    config: types.ModuleType
    fast_path: types.ModuleType
    optimiser: types.ModuleType
    platform: Any
    version: str
    stood_in: tuple[str, ...]


_imported: dict[tuple[Path, Kind], _Parts] = {}
_stood_in: list[str] = []


def _import(folder: Path, kind: Kind) -> _Parts:
    if (folder, kind) in _imported:
        return _imported[folder, kind]
    if not (folder / "sglang").is_dir():
        raise PeerUnavailable(f"no sglang/ in {folder}: run benchmarks/fetch_sglang.sh {folder}")
    if not any(isinstance(finder, _SGLangFinder) for finder in sys.meta_path):
        if "sglang" in sys.modules:
            raise PeerUnavailable("another sglang is imported already")
        sys.meta_path.insert(0, _SGLangFinder(folder))
        sys.path.append(str(folder))
    try:
        import diffusers.models.autoencoders  # noqa: F401  before the stand-ins, so that it sees none of them

        with _stand_ins() as made:
            platform = importlib.import_module(f"{_GEN}.runtime.platforms").current_platform
            model = importlib.import_module(f"{_VAES}.{_MODULES[kind].model}")
            config = importlib.import_module(f"{_GEN}.configs.models.vaes.{_MODULES[kind].config}")
            fast_path = importlib.import_module(f"{_VAES}.fast_path_gate")
            optimiser = importlib.import_module(f"{_VAES}.wan_vae_cuda_opt")
            importlib.import_module(f"{_GEN}.runtime.loader.utils")
        _stood_in.extend(made)
    except PeerUnavailable:
        raise
    except Exception as error:  # whatever its modules raise when imported: the benchmark goes on without the peer
        raise PeerUnavailable(f"SGLang's VAE could not be imported: {type(error).__name__}: {error}") from error
    version = importlib.metadata.version("sglang")
    parts = _Parts(model, config, fast_path, optimiser, platform, version, tuple(_stood_in))
    _imported[folder, kind] = parts
    return parts


@dataclass
class Peer:
    """SGLang's VAE on one device. Results have the dtype its class returns: Wan's decode gives float32."""

    vae: Any
    what_ran: str
    weights_dtype: torch.dtype
    autocast: torch.dtype | None
    _parts: _Parts = field(repr=False)

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
) -> Peer:
    """SGLang's class for `kind`, with these weights, as its loader would leave it on this device.

    `qwen` is the class SGLang serves Qwen-Image with: bfloat16 weights without autocast, which is `plain`. `wan` is
    its class for Wan 2.1, the same network with more of its path fused (biases and residuals in one kernel, the
    frame interleave in channels_last_3d). Wan's pipeline decodes fp32 weights under autocast; `pipeline` does so,
    while `plain` holds the weights in `dtype`, so that both peers compute in the same precision.
    """
    device = torch.device(device)
    parts = _import(Path(folder).resolve(), kind)
    on_cuda = device.type == "cuda"
    if on_cuda and not parts.platform.is_cuda():
        raise PeerUnavailable(f"SGLang sees no CUDA here: its platform is {type(parts.platform).__name__}")
    if on_cuda and not parts.optimiser._HAS_TRITON:
        raise PeerUnavailable("SGLang's Triton kernels could not be imported")
    if kind == "wan" and torch.distributed.is_initialized():
        raise PeerUnavailable("SGLang's Wan class asks for its own process groups where torch.distributed is set up")
    autocast = dtype if kind == "wan" and precision == "pipeline" and dtype != torch.float32 else None
    held = torch.float32 if autocast else dtype
    try:
        vae = _loaded(parts, kind, state_dict, held, device, base_dim)
    except Exception as error:
        raise PeerUnavailable(f"SGLang's VAE could not be built: {type(error).__name__}: {error}") from error

    converted = 0
    if on_cuda:
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
                converted += 1
        vae = parts.platform.optimize_vae(vae)
    norms, upsamples = _fused(parts, vae)
    if on_cuda and not (norms and upsamples and vae in parts.fast_path._VAE_FAST_PATH_GATES):
        raise PeerUnavailable("SGLang's CUDA fast path was not installed; its log says why")

    precise = f"{held} weights under {autocast} autocast" if autocast else f"{held} weights, no autocast"
    optimised = (
        f"{converted} Conv3d weights in channels_last_3d, {norms} fused RMSNorm+SiLU, {upsamples} channels_last "
        "upsamples, cat+pad+cache kernel"
        + (", conv bias and residual kernel" if kind == "wan" else "")
        + ", fast path on (quality lossless, SGLang's default)"
        if on_cuda
        else "none of its CUDA optimisations"
    )
    what_ran = (
        f"SGLang {parts.version}'s {type(vae).__name__} ({precise}, {optimised}; torch {torch.__version__}, "
        f"triton {_version('triton')}, diffusers {_version('diffusers')}); not torch.compiled, as by default; "
        f"stood in for: the __init__ of {', '.join(_WITHOUT_INIT)}; {', '.join(_REPLACED)}; "
        f"absent packages {', '.join(parts.stood_in) or 'none'}"
    )
    return Peer(vae, what_ran, held, autocast, parts)


def _loaded(
    parts: _Parts, kind: Kind, state_dict: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, base_dim: int
) -> nn.Module:
    """Built on the CPU in its dtype, moved, loaded and frozen, in the order of SGLang's loader."""
    utils = sys.modules[f"{_GEN}.runtime.loader.utils"]
    stem = _MODULES[kind].stem
    config = getattr(parts.config, f"{stem}VAEConfig")()
    config.update_model_arch({"base_dim": base_dim, "latents_mean": (0.0,) * 16, "latents_std": (1.0,) * 16})
    config.post_init()
    with utils.set_default_torch_dtype(dtype):
        vae: nn.Module = getattr(parts.model, f"AutoencoderKL{stem}")(config)
    vae = vae.to(device)
    utils.load_model_state_dict(vae, dict(state_dict), strict=True)
    return utils.finalize_loaded_model(vae)


def _fused(parts: _Parts, vae: nn.Module) -> tuple[int, int]:
    found = [type(module) for module in vae.modules()]
    return found.count(parts.optimiser.FusedWanRMSNormSiLU), found.count(parts.optimiser.GatedChannelsLastUpsample)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


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
