"""What may enter a decode or an encode: one error for each fault, saying what came and what is needed."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from paravae.configs import VAEArchConfig

OUTPUT_TYPES = ("float", "uint8")


def check_latents(latents: Tensor, arch: VAEArchConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless ``latents`` are [B, z_dim, T, h, w] in the weights' dtype, on their device."""
    _check_tensor("latents", latents, dtype, device)
    if latents.dim() != 5 or latents.shape[1] != arch.z_dim or 0 in latents.shape:
        raise ValueError(
            f"latents have shape {list(latents.shape)}, need [B, {arch.z_dim}, T, h, w] with B, T, h, w >= 1 "
            "(an image has T = 1)"
        )


def check_pixels(pixels: Tensor, arch: VAEArchConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless ``pixels`` are [B, 3, F, H, W] of sizes that the encoder can divide."""
    _check_tensor("pixels", pixels, dtype, device)
    channels, space, time = arch.input_channels, arch.spatial_ratio, arch.temporal_ratio
    if pixels.dim() != 5 or pixels.shape[1] != channels or 0 in pixels.shape:
        raise ValueError(
            f"pixels have shape {list(pixels.shape)}, need [B, {channels}, F, H, W] with B, F, H, W >= 1 "
            "(an image has F = 1)"
        )
    frames, height, width = pixels.shape[2:]
    if height % space or width % space:
        raise ValueError(
            f"pixels are {height} x {width} (height x width), need multiples of {space}; "
            f"crop to {height - height % space} x {width - width % space} or pad"
        )
    if (frames - 1) % time:
        raise ValueError(
            f"pixels have {frames} frames, need 1 + a multiple of {time}; "
            f"the nearest below is {frames - (frames - 1) % time}"
        )


def check_half(half: str, loaded: bool) -> None:
    """Raise ValueError unless the ``half`` of the VAE that is needed, encoder or decoder, was built."""
    if not loaded:
        raise ValueError(f"this VAE was built without its {half} (load_{half}=False), so it cannot {half[:-1]}")


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}, needs one of {', '.join(OUTPUT_TYPES)}")


def check_gather_to(gather_to: object, ranks: int) -> None:
    """Raise ValueError unless ``gather_to`` is "all" or one of the ``ranks`` of the group."""
    if gather_to == "all" or (isinstance(gather_to, int) and 0 <= gather_to < ranks):
        return
    among = "0, the only rank" if ranks == 1 else f"a rank of the group, 0 to {ranks - 1}"
    raise ValueError(f"gather_to is {gather_to!r}, needs 'all' or {among}")


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} are a {type(value).__name__}, need a torch.Tensor")
    if value.dtype != dtype:
        raise ValueError(f"{name} are {value.dtype}, the weights are {dtype}: convert one ({name}.to({dtype}))")
    if value.device.type != device.type or (device.index is not None and value.device != device):
        raise ValueError(f"{name} are on {value.device}, the weights are on {device}: move one")


class FiniteCheck:
    """Refuses NaN and Inf without making a GPU wait.

    On the CPU it looks at once. On a GPU it looks when asked, after this decode's own work has been queued, from a
    stream of its own, where the values are waited for but not that work: so neither GPU nor host runs dry meanwhile.
    """

    def __init__(self, name: str, values: Tensor) -> None:
        self._name = name
        self._values = values
        self._there: torch.cuda.Event | None = None
        if values.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(values.device))
        else:
            self._look()

    def raise_if_not(self) -> None:
        """Raise ValueError if a value was NaN or Inf."""
        if self._there is not None:
            self._look()

    def _look(self) -> None:
        if not self._largest().isfinite():
            nan, inf = int(self._values.isnan().sum()), int(self._values.isinf().sum())
            raise ValueError(
                f"{self._name} hold {nan} NaN and {inf} Inf among {self._values.numel()} values, need finite numbers"
            )

    def _largest(self) -> Tensor:
        """The largest magnitude, on the host. One pass over the values; NaN and Inf stay what they are."""
        if self._there is None:
            return torch.linalg.vector_norm(self._values, torch.inf)
        stream = _side_stream(self._values.device)
        stream.wait_event(self._there)
        with torch.cuda.stream(stream):
            return torch.linalg.vector_norm(self._values, torch.inf).cpu()


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # its kernel is small, and is not to queue behind a decode's
