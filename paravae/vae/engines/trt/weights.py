"""The weights that engines have to be made of, as they are in a VAE: named by a hash, made anew when they change."""

from __future__ import annotations

from torch import nn

from paravae.vae.engines.base import Half
from paravae.vae.engines.trt.manifest import weights_sha256
from paravae.vae.engines.trt.parts import DTYPES
from paravae.vae.engines.weight_state import WeightState


class Weights:
    """Of ``vae``, whose state dict has the published keys. It is asked at each use: it may be loaded or cast later."""

    def __init__(self, vae: nn.Module) -> None:
        self._vae, self.state = vae, WeightState([vae])
        self._hashes: dict[Half, tuple[list[tuple[int, int]], str]] = {}

    @property
    def dtype(self) -> str:
        """As ``parts.ExportOptions`` calls it; of any other dtype, PyTorch's name."""
        dtype = next(self.state.parameters()).dtype
        return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))

    def sha256(self, half: Half) -> str:
        now = self.state.now()
        if half not in self._hashes or self._hashes[half][0] != now:
            self._hashes[half] = (now, weights_sha256(self._vae.state_dict(), half))
        return self._hashes[half][1]
