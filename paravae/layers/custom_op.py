"""Ops with an implementation for each kind of device, found by name, and forced where someone wants to compare.

    @CustomOp.register("double")
    class Double(CustomOp):
        def forward_native(self, x):
            return x + x

``Double()(x)`` runs ``forward_cuda`` for a tensor on an NVIDIA GPU, ``forward_hip`` on an AMD one, ``forward_cpu`` on
a CPU and ``forward_native`` anywhere else. An implementation that a class does not write is its next in that order of
likeness: HIP is CUDA, and CUDA and CPU are plain PyTorch. ``Double(force="native")`` or the environment variable
``PARAVAE_CUSTOM_OPS=native`` (or ``=double:native,other:cuda``), read when an op is made, have one run always.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

WAYS = ("cuda", "hip", "cpu", "native")
VARIABLE = "PARAVAE_CUSTOM_OPS"

Op = TypeVar("Op", bound="type[CustomOp]")


class CustomOp:
    """See the head of this file. The first argument of a call is the tensor that decides.

    Args:
        force: one of ``WAYS``, to run that implementation whatever the device; it goes before the environment.

    Raises:
        ValueError: ``force`` or the environment names no implementation, or an op that there is not.
    """

    name: ClassVar[str]
    _registered: ClassVar[dict[str, type[CustomOp]]] = {}

    @staticmethod
    def register(name: str) -> Callable[[Op], Op]:
        """Decorates a class: under ``name`` it is found, forced and listed.

        Raises:
            ValueError: the name is taken.
        """

        def registering(op: Op) -> Op:
            if name in CustomOp._registered:
                raise ValueError(f"there is an op {name!r} already: {CustomOp._registered[name].__qualname__}")
            op.name = name
            CustomOp._registered[name] = op
            return op

        return registering

    @staticmethod
    def registered() -> dict[str, type[CustomOp]]:
        """All ops, by name."""
        return dict(CustomOp._registered)

    def __init__(self, *, force: str | None = None) -> None:
        if force is not None and force not in WAYS:
            raise ValueError(f"force is {force!r}, not one of {', '.join(WAYS)}")
        self.forced = force or _forced_by_environment(self.name)

    def way(self, device: torch.device) -> str:
        """Which of ``WAYS`` runs for tensors on ``device``."""
        return self.forced or self._by_device(device)

    @staticmethod
    def _by_device(device: torch.device) -> str:
        if device.type == "cuda":
            return "hip" if torch.version.hip else "cuda"
        return "cpu" if device.type == "cpu" else "native"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dispatch(*args, **kwargs)

    def dispatch(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The implementation that is for ``x``; what a class's own ``__call__`` ends with, if it has one."""
        return getattr(self, f"forward_{self.way(x.device)}")(x, *args, **kwargs)

    def forward_native(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In plain PyTorch, on any device: what the others are held against."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_native")

    def forward_cuda(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.forward_native(x, *args, **kwargs)

    def forward_hip(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.forward_cuda(x, *args, **kwargs)

    def forward_cpu(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.forward_native(x, *args, **kwargs)

    def kernel_unfit(self, device: torch.device) -> str | None:
        """Why no kernel of this op would run on ``device``, or None if one would."""
        return "the op has none"


def describe_ops(device: torch.device | str | None = None) -> str:
    """A line for each registered op: what would run on ``device`` (default: a GPU if there is one), and why."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ops = [kind() for _, kind in sorted(CustomOp.registered().items())]
    width = max((len(op.name) for op in ops), default=0)
    return "\n".join(f"{op.name:{width}}  {_what_runs(op, chosen)}" for op in ops)


def _what_runs(op: CustomOp, device: torch.device) -> str:
    way = op.way(device)
    forced = f" (forced; {op._by_device(device)} otherwise)" if op.forced else ""
    if way in ("cpu", "native"):
        return f"forward_{way}{forced}: plain PyTorch"
    reason = op.kernel_unfit(device)
    return f"forward_{way}{forced}: " + ("the kernel" if reason is None else f"plain PyTorch, as {reason}")


def _forced_by_environment(name: str) -> str | None:
    """What ``PARAVAE_CUSTOM_OPS`` says about the op; what names it goes before what is for all."""
    ways: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        op, _, way = entry.rpartition(":")
        if way not in WAYS or (op and op not in CustomOp._registered):
            raise ValueError(
                f"{VARIABLE} has {entry!r}, which is not WAY or OP:WAY with WAY one of {', '.join(WAYS)} "
                f"and OP one of {', '.join(sorted(CustomOp._registered))}"
            )
        ways[op] = way
    return ways.get(name, ways.get(""))
