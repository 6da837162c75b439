"""Which way a fused op goes: its kernel or its plain PyTorch reference. Decided here, with a reason.

A kernel that cannot run (no Triton, another device, an odd dtype or shape) or that fails to compile gives way to
its reference, which computes the same to rounding. Each reason is logged once and can be asked for (``fallbacks``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import ParamSpec

try:
    import triton
    import triton.language as tl
except ImportError:  # not installed, or not made for this platform
    triton = tl = None

logger = logging.getLogger("paravae")

P = ParamSpec("P")
R = TypeVar("R")

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_references_only: ContextVar[bool] = ContextVar("references_only", default=False)
_said: set[tuple[str, str]] = set()


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, or without Triton the function itself, which then is never called."""
    return function if triton is None else triton.jit(function)


@contextmanager
def references_only() -> Iterator[None]:
    """Within this context every fused op takes its reference: for tests, and to compare."""
    token = _references_only.set(True)
    try:
        yield
    finally:
        _references_only.reset(token)


def fallbacks() -> dict[str, set[str]]:
    """The reasons for which ops of this process have taken their reference on a GPU, by op."""
    found: dict[str, set[str]] = {}
    for name, reason in _said:
        found.setdefault(name, set()).add(reason)
    return found


class FusedOp(Generic[P, R]):
    """An op with two implementations of one signature, whose first argument is the tensor that decides.

    ``unfit``: names what the kernel cannot do about these arguments, or None. ``triton``: whether it is Triton's.
    ``otherwise``: what the reference is, in words.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[P, R],
        kernel: Callable[P, R],
        unfit: Callable[P, str | None],
        *,
        triton: bool = True,
        otherwise: str = "plain PyTorch",
    ) -> None:
        self.name, self.reference, self.kernel, self._unfit = name, reference, kernel, unfit
        self._is_triton, self._otherwise = triton, otherwise
        self.__doc__ = reference.__doc__
        self._broken: str | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        decisive = args[0]
        assert isinstance(decisive, Tensor)
        reason = self._reason(*args, **kwargs)
        if reason is None:
            try:
                return self.kernel(*args, **kwargs)
            except Exception as error:
                if _is_of_the_device(error):
                    raise
                self._broken = reason = f"the kernel failed: {type(error).__name__}: {_first_line(error)}"
        if decisive.is_cuda and not _references_only.get():
            self._say(reason)
        return self.reference(*args, **kwargs)

    def _reason(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """Why the reference is taken, or None."""
        decisive = args[0]
        assert isinstance(decisive, Tensor)
        if reason := self.unfit_on(decisive.device):
            return reason
        if self._is_triton and decisive.dtype not in _KERNEL_DTYPES:
            return f"the kernel does not take {decisive.dtype}"
        return self._unfit(*args, **kwargs)

    def unfit_on(self, device: torch.device) -> str | None:
        """Why the kernel would run for no tensor on ``device``, or None."""
        if _references_only.get():
            return "references were asked for"
        return (_unfit_for_triton(device) if self._is_triton else None) or self._broken

    def _say(self, reason: str) -> None:
        if (self.name, reason) not in _said:
            _said.add((self.name, reason))
            logger.warning("%s runs as %s: %s", self.name, self._otherwise, reason)


def split_channels(channels: int) -> tuple[int, int]:
    """``channels`` as the powers of two that a kernel handles them in: (96 -> 64, 32), (64 -> 64, 0).

    Where the rest is no power of two, the second is the next one above it, to be masked.
    """
    first = 1 << (channels.bit_length() - 1)
    rest = channels - first
    return first, 1 << (rest - 1).bit_length() if rest else 0


def _unfit_for_triton(device: torch.device) -> str | None:
    if triton is None:
        return "Triton is not installed"
    if not (device.type == "cuda" or _interpreting()):
        return f"Triton does not run on {device.type}"
    return None


def _interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_of_the_device(error: Exception) -> bool:
    """Errors that the reference would meet as well, or that leave the device unusable: they must be seen."""
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
