"""The TensorRT engine: images through engine files where there are some for their size, all else by PyTorch.

Which of the two runs is agreed on by all ranks that share a picture, before work starts and again when it is done: one
picture is never half the one and half the other, since they round otherwise. So every reason not to use an engine, on
any rank (a file that is missing, truncated or foreign, a GPU that refuses it, a size outside all profiles, no memory, a
failed run, a result that is not finite), gives all ranks PyTorch's picture, a line in the log and a count in
``report``; or, with ``strict``, an error on all.

An engine knows shapes, not places: it computes a window as if it were a whole picture. The window that it is given has
the halo that the plan gives it, within which zero padding at an inner edge does harm, and that is cut away.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from paravae.vae.engines.base import Agree, Engine, HeadShare, Load
from paravae.vae.engines.torch_engine import cut
from paravae.vae.engines.trt.needs import Need, needs_of
from paravae.vae.engines.trt.parts import Part
from paravae.vae.engines.trt.runner import EngineError
from paravae.vae.engines.trt.windows import window_fed, window_given
from paravae.vae.models.stage import crop
from paravae.vae.pixels import to_uint8
from paravae.vae.plan import Stages, Window

logger = logging.getLogger("paravae")

Run = Callable[[Tensor], Tensor]
"""A part of the network for one image: [1, C, h, w] -> [1, C', h', w']."""


class EngineStore(Protocol):
    """Where engines come from."""

    def summary(self) -> dict[str, Any]:
        """What is loaded and what was, as plain values."""
        ...

    def runs(self, needs: Sequence[Need], device: torch.device) -> Sequence[Run]:
        """One for each need, loaded.

        Raises:
            EngineError: there is none for a need, or it cannot be loaded, and why.
        """
        ...


@dataclass
class Report:
    """What ran since the engine was made, in calls. ``fallbacks``: how often PyTorch stood in, by reason."""

    tensorrt: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass
class _Call:
    """A call that is under way: what it runs by need, what went wrong on this rank, which results are finite."""

    runs: dict[Need, Run]
    trouble: str | None = None
    finite: list[tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=list)

    def remember(self, y: Tensor) -> None:
        """Whether ``y`` is finite, to be asked for when it is known: the host does not wait for it here."""
        finite, done = y.isfinite().all(), None
        if y.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self.finite.append((finite, done))

    def not_finite(self) -> str | None:
        for finite, done in self.finite:
            if done is not None:
                done.synchronize()
            if not finite:
                return "an engine's result is not finite"
        return None


class TensorRTEngine:
    """Implements ``engines.base.Engine`` around ``inner``, a PyTorch engine of the same weights.

    ``channels``: of what each part gives. ``strict``: raise where PyTorch would stand in.
    """

    shares_head = False  # nothing can be exchanged in the middle of an engine

    def __init__(self, inner: Engine, store: EngineStore, channels: Mapping[Part, int], *, strict: bool) -> None:
        self.inner, self._store, self._channels, self._strict = inner, store, channels, strict
        self.decoder_front, self.decoder_stages = inner.decoder_front, inner.decoder_stages
        self.encoder_stages, self.encoder_front = inner.encoder_stages, inner.encoder_front
        self.feature_channels, self.attention_channels = inner.feature_channels, inner.attention_channels
        self.report = Report()
        self._call: _Call | None = None

    def decode(
        self, latents: Tensor, trace: Sequence[Window], *, as_uint8: bool = False, head: HeadShare | None = None
    ) -> Iterator[Tensor]:
        if self._call is None or not trace[-1].area:
            self._refuse_video(latents)
            yield from self.inner.decode(latents, trace, as_uint8=as_uint8, head=head)
            return
        frame = (latents.shape[-2], latents.shape[-1])
        if ("decoder", frame) in self._call.runs:
            pixels = self._run("decoder", latents)
        else:
            pixels = self._window("decoder_tail", self._run("decoder_head", latents), self.decoder_stages, trace)
        yield to_uint8(pixels) if as_uint8 else pixels

    def encode_window(self, pixels: Tensor, trace: Sequence[Window]) -> Iterator[Tensor]:
        if self._call is None:
            self._refuse_video(pixels)
            yield from self.inner.encode_window(pixels, trace)
            return
        yield self._window("encoder_body", pixels, self.encoder_stages, trace)

    def encode_features(self, features: Tensor, head: HeadShare | None = None) -> Tensor:
        return self.inner.encode_features(features, head) if self._call is None else self._run("encoder_head", features)

    def encode(self, pixels: Tensor) -> Tensor:
        if self._call is None:
            return self.inner.encode(pixels)
        if ("encoder", (pixels.shape[-2], pixels.shape[-1])) in self._call.runs:
            return self._run("encoder", pixels)
        return self._run("encoder_head", self._run("encoder_body", pixels))

    def call(
        self, load: Load, key: Hashable, function: Callable[[Tensor], Tensor], value: Tensor, agree: Agree
    ) -> Tensor:
        """By engines, if all ranks have what they need and all come through; else by ``inner``."""
        runs, reason = self._loaded(load, value)
        if agree(int(reason is None)):
            self._call = call = _Call(runs)
            try:
                result = function(value)
            finally:
                self._call = None
            reason = call.trouble or call.not_finite()
            if agree(int(reason is None)):
                self.report.tensorrt += 1
                return result
        self._stand_in(reason or "another rank cannot use its engine")
        return self.inner.call(load, key, function, value, agree)

    def repeats(self, call: Callable[[], None]) -> bool:
        return self._call is None and self.inner.repeats(call)

    def kind(self, dtype: torch.dtype, device: torch.device) -> str:
        return self.inner.kind(dtype, device)

    def estimated_bytes(self, load: Load, dtype: torch.dtype, device: torch.device, *, stream: bool) -> int:
        """As for ``inner``, which may have to stand in."""
        return self.inner.estimated_bytes(load, dtype, device, stream=stream)

    def summary(self) -> dict[str, Any]:
        """What ran, as plain values."""
        ran = {"tensorrt": self.report.tensorrt, "pytorch": self.report.fallbacks.total()}
        return {"ran": ran, "fallbacks": dict(self.report.fallbacks), **self._store.summary()}

    # ------------------------------------------------------------------------------------------- own affairs

    def _loaded(self, load: Load, value: Tensor) -> tuple[dict[Need, Run], str | None]:
        """What the call needs, loaded; or why it cannot be."""
        if torch.is_grad_enabled() and value.requires_grad:
            return {}, "a gradient is asked for"
        reason = ""
        for needs in needs_of(load, self.decoder_stages, self.encoder_stages):
            try:
                return dict(zip(needs, self._store.runs(needs, value.device), strict=True)), None
            except (EngineError, torch.OutOfMemoryError) as error:
                reason = reason or _first_line(error)  # of the better way
        return {}, reason

    def _window(self, part: Part, x: Tensor, stages: Stages, trace: Sequence[Window]) -> Tensor:
        """The window ``trace[-1]`` of what the local part gives for the whole ``x``."""
        fed = window_fed(stages, trace)
        return crop(self._run(part, cut(x, fed)), window_given(stages, fed), trace[-1])

    def _run(self, part: Part, x: Tensor) -> Tensor:
        """[B, C, 1, h, w] -> [B, C', 1, h', w']; zeros, if this rank is in trouble: the others count on its part."""
        call, dtype = self._call, x.dtype
        assert call is not None
        if call.trouble is None:
            try:
                run = call.runs[part, (x.shape[-2], x.shape[-1])]
                y = torch.cat([run(image) for image in x[:, :, 0].split(1)])[:, :, None].to(dtype)
                call.remember(y)
                return y
            except (EngineError, torch.OutOfMemoryError) as error:
                call.trouble = f"{part}: {_first_line(error)}"
        scale = self._scale if part.startswith("decoder") else 1 / self._scale
        scale = 1 if part.endswith("head") else scale
        size = (round(x.shape[-2] * scale), round(x.shape[-1] * scale))
        return x.new_zeros((x.shape[0], self._channels[part], 1, *size))

    @property
    def _scale(self) -> int:
        """Pixels that a latent covers."""
        return int(2 ** sum(stage.resize == "up" for stage in self.decoder_stages))

    def _refuse_video(self, value: Tensor) -> None:
        if value.shape[2] > 1:
            self._stand_in("a video: engines take single frames")

    def _stand_in(self, reason: str) -> None:
        """PyTorch does it: said once for each reason, counted always."""
        if self._strict:
            raise EngineError(f"TensorRT was asked for, strictly, and cannot be had: {reason}")
        if reason not in self.report.fallbacks:
            logger.warning("PyTorch stands in for TensorRT: %s", reason)
        self.report.fallbacks[reason] += 1


def _first_line(error: Exception) -> str:
    kind = "out of memory: " if isinstance(error, torch.OutOfMemoryError) else ""
    return kind + (str(error).strip().splitlines() or [type(error).__name__])[0]
