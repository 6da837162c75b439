"""What is right: the plain fp32 result, and how far from it each contestant may be."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from paravae import AutoencoderKLQwenImage

logger = logging.getLogger("paravae")

CORRECT_WORDS = (
    "max_error, rms_error: against paravae's plain PyTorch engine in fp32 (TF32 off); the input, rounded to the "
    "benched dtype, is the same for all. correct: RMS error at most 1.05 x that of diffusers' own class (eager) where "
    "it ran (others than paravae: 1.5 x, which shows that they compute the same), else at most 5 % of truth_std, the "
    "standard deviation of the fp32 result. Checked before any time counts."
)
REFERENCE = "diffusers"
OURS = "paravae"
_ALLOWED_RATIO = 1.05  # of the reference's RMS error
_ALLOWED_PEER_RATIO = 1.5  # the same, of others: it is not ours to say how exact they should be
_ALLOWED_SHARE = 0.05  # of the truth's standard deviation, where there is no reference
_ROUNDING = 1e-5  # of the truth's standard deviation: fp32's own, by which two right ways to sum differ
ERRORS = ("max_error", "rms_error", "truth_std")
_NO_NUMBER = 1e6  # what an error counts as that is NaN or infinite: JSON has neither


class Truth:
    """The fp32 results of one input, on the host: computed when first asked for."""

    def __init__(self, vae: AutoencoderKLQwenImage, what: str, given: Tensor) -> None:
        self._vae, self._what, self._given = vae, what, given
        self._found: dict[bool, Tensor] = {}

    def result(self, tiled: bool) -> Tensor:
        """The exact one, or that of tiles, which are approximate by nature: a tiled decode is held against it."""
        if tiled not in self._found:
            began = time.monotonic()
            self._found[tiled] = self._compute(tiled).cpu()
            taken = time.monotonic() - began
            logger.info("the fp32 %s%s to check by took %.1f s", "tiled " * tiled, self._what, taken)
        return self._found[tiled]

    def _compute(self, tiled: bool) -> Tensor:
        given = self._given.float()
        if self._what == "encode":
            return self._vae.encode(given).mode()
        return self._vae.tiled_decode(given) if tiled else self._vae.decode(given)


def errors(out: Tensor, truth: Tensor) -> dict[str, float]:
    """Largest and RMS difference, and the truth's spread; a frame at a time, so a video's doubles need little memory.

    Raises:
        ValueError: the shapes differ.
    """
    if out.shape != truth.shape:
        raise ValueError(f"the result has shape {list(out.shape)}, needs {list(truth.shape)}")
    largest, squares = 0.0, 0.0
    for own, exact in zip(out.split(1, dim=2), truth.split(1, dim=2), strict=True):
        difference = own.double() - exact.to(own.device).double()
        if not difference.isfinite().all():
            largest, squares = _NO_NUMBER, _NO_NUMBER**2 * out.numel()
            break
        largest = max(largest, float(difference.abs().max()))
        squares += float(difference.square().sum())
    found = (largest, (squares / out.numel()) ** 0.5, float(truth.std()))
    return {name: float(f"{value:.6g}") for name, value in zip(ERRORS, found, strict=True)}


def judge(rows: Sequence[dict[str, Any]]) -> None:
    """Say of every row that has errors whether it is ``correct``."""
    checked = [row for row in rows if "rms_error" in row]
    reference = next((row["rms_error"] for row in checked if row["who"] == REFERENCE), None)
    for row in checked:
        row["correct"] = row["rms_error"] <= _allowed_rms(row, reference)


def is_ours(row: Mapping[str, Any]) -> bool:
    """Whether paravae made it, in whatever way it was run ("paravae", "paravae-alone" ...)."""
    return row["who"].partition("-")[0] == OURS


def _allowed_rms(row: Mapping[str, Any], reference: float | None) -> float:
    if reference is None:
        return _ALLOWED_SHARE * row["truth_std"]
    ratio = _ALLOWED_RATIO if is_ours(row) else _ALLOWED_PEER_RATIO
    return max(ratio * reference, _ROUNDING * row["truth_std"])
