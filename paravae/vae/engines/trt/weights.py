"""The weights that engines have to be made of, as they are in a VAE: named by a hash, made anew when they change."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from paravae.vae.engines.base import Half
from paravae.vae.engines.trt.manifest import weights_sha256
from paravae.vae.engines.trt.parts import DTYPES


class Weights:
    """Of ``vae``, whose state dict has the published keys. It is asked at each use: it may be loaded or cast later."""

    def __init__(self, vae: nn.Module) -> None:
        self._vae = (vae,)  # in a tuple: a module would make it a submodule of whoever is one
        self._hashes: dict[Half, tuple[Hashable, str]] = {}

    @property
    def state(self) -> Hashable:
        """Another after every change of a weight; nothing is read for it."""
        return tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in self._vae[0].parameters())

    @property
    def dtype(self) -> str:
        """As ``parts.ExportOptions`` calls it; of any other dtype, PyTorch's name."""
        dtype = next(self._vae[0].parameters()).dtype
        return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))

    def sha256(self, half: Half) -> str:
        state = self.state
        if half not in self._hashes or self._hashes[half][0] != state:
            self._hashes[half] = (state, weights_sha256(self._vae[0].state_dict(), half))
        return self._hashes[half][1]
