"""Import SGLang's modules from a folder, without its server: its VAE here, for `sglang_peer.py`, which builds a peer of
it; its modulation kernels from `modulation_peers.py`.

What is replaced here is only what never computes a pixel: the `__init__` files that would import the server, packages
of the server that are not installed, and the fast paths of other VAEs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

Kind = Literal["qwen", "wan"]

GEN = "sglang.multimodal_gen"
VAES = f"{GEN}.runtime.models.vaes"

# Packages whose __init__ imports the server; where their names are asked for, they come from the module beside.
WITHOUT_INIT: dict[str, str | None] = {
    "sglang": None,
    "sglang.srt.distributed": None,
    "sglang.srt.utils": "sglang.srt.utils.common",
    "sglang.kernels": None,
    "sglang.kernels.ops": None,
    GEN: None,
    f"{GEN}.configs.models": f"{GEN}.configs.models.vaes.base",
    f"{GEN}.runtime.cache": None,
    f"{GEN}.runtime.loader.component_loaders": None,
}


def _unchanged(vae: nn.Module) -> nn.Module:
    return vae


def _no_server() -> None:
    raise ValueError("there is no server")


# Modules of SGLang replaced whole: a type used in annotations and the server's flags, for which its VAEs and paravae's
# plug-in ask; an error of its loader's; the installers of other VAEs' fast paths, which
# return a Wan or Qwen-Image VAE as it is but import what their own models need; and the language models' table of
# groups, which the diffusion side fills where it is empty, and leaves alone where it is not, as here.
REPLACED: dict[str, dict[str, object]] = {
    "sglang.srt.distributed.parallel_state": dict.fromkeys(
        ("_WORLD", "_TP", "_ATTN_TP", "_MOE_TP", "_MOE_EP"), object()
    ),
    f"{GEN}.runtime.server_args": {"ServerArgs": object, "get_global_server_args": _no_server},
    f"{GEN}.runtime.loader.component_loaders.component_loader": {"ComponentCheckpointUnsupportedError": ValueError},
    f"{VAES}.flux2_vae_cuda_opt": {
        "maybe_optimize_autoencoder_kl": _unchanged,
        "maybe_optimize_flux2_vae": _unchanged,
    },
    f"{VAES}.minimax_h3_vae_cuda_opt": {"maybe_optimize_minimax_h3_vae": _unchanged},
    f"{VAES}.qwen_image21_vae_cuda_opt": {"maybe_optimize_qwen_image21_vae": _unchanged},
}

# The server's transport and serialisation, imported at the head of utility modules; stood in for only where absent.
_SERVER_ONLY = frozenset({"orjson", "pybase64", "pydantic_core", "starlette", "zmq"})


class _Names(NamedTuple):
    model: str
    config: str
    stem: str


MODULES: dict[Kind, _Names] = {
    "qwen": _Names("autoencoder_kl_qwenimage", "qwenimage", "QwenImage"),
    "wan": _Names("wanvae", "wanvae", "Wan"),
}


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
    """Gives SGLang's packages without their `__init__`, and the modules of `replaced`."""

    def __init__(
        self, folder: Path, without_init: Mapping[str, str | None], replaced: Mapping[str, dict[str, object]]
    ) -> None:
        self.folder, self.without_init, self.replaced = folder, without_init, replaced

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in self.without_init:
            spec = importlib.machinery.ModuleSpec(fullname, self, is_package=True)
            spec.submodule_search_locations = [str(self.folder.joinpath(*fullname.split(".")))]
            return spec
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self.replaced else None

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        if name in self.replaced:
            vars(module).update(self.replaced[name])
            return
        source = self.without_init[name]

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
class Parts:
    """What a peer needs of SGLang, imported."""

    model: types.ModuleType
    config: types.ModuleType
    fast_path: types.ModuleType
    optimiser: types.ModuleType
    distributed: types.ModuleType
    platform: Any
    version: str
    stood_in: tuple[str, ...]


def open_folder(
    folder: Path, without_init: Mapping[str, str | None], replaced: Mapping[str, dict[str, object]]
) -> None:
    """From here on `import sglang...` finds what is in `folder`, the first that this is called for.

    Raises:
        PeerUnavailable: it is not there, or SGLang was imported before, from elsewhere or with other replacements.
    """
    if not (folder / "sglang").is_dir():
        raise PeerUnavailable(f"no sglang/ in {folder}: run benchmarks/fetch_sglang.sh {folder}")
    open_ones = [finder for finder in sys.meta_path if isinstance(finder, _SGLangFinder)]
    if not open_ones and "sglang" not in sys.modules:
        sys.meta_path.insert(0, _SGLangFinder(folder, without_init, replaced))
        sys.path.append(str(folder))
    elif not open_ones or open_ones[0].without_init is not without_init:
        raise PeerUnavailable("another sglang is imported already")


_imported: dict[tuple[Path, Kind], Parts] = {}
_stood_in: list[str] = []


def import_vae(folder: Path, kind: Kind) -> Parts:
    """The modules of SGLang's class for `kind`, from what `benchmarks/fetch_sglang.sh` laid out in `folder`.

    Raises:
        PeerUnavailable: they cannot be imported, and why.
    """
    if (folder, kind) in _imported:
        return _imported[folder, kind]
    open_folder(folder, WITHOUT_INIT, REPLACED)
    try:
        import diffusers.models.autoencoders  # noqa: F401  before the stand-ins, so that it sees none of them

        with _stand_ins() as made:
            platform = importlib.import_module(f"{GEN}.runtime.platforms").current_platform
            model = importlib.import_module(f"{VAES}.{MODULES[kind].model}")
            config = importlib.import_module(f"{GEN}.configs.models.vaes.{MODULES[kind].config}")
            fast_path = importlib.import_module(f"{VAES}.fast_path_gate")
            optimiser = importlib.import_module(f"{VAES}.wan_vae_cuda_opt")
            distributed = importlib.import_module(f"{GEN}.runtime.distributed")
            importlib.import_module(f"{GEN}.runtime.loader.utils")
        _stood_in.extend(made)
    except PeerUnavailable:
        raise
    except Exception as error:  # whatever its modules raise when imported: the benchmark goes on without the peer
        raise PeerUnavailable(f"SGLang's VAE could not be imported: {type(error).__name__}: {error}") from error
    version = importlib.metadata.version("sglang")
    parts = Parts(model, config, fast_path, optimiser, distributed, platform, version, tuple(_stood_in))
    _imported[folder, kind] = parts
    return parts
