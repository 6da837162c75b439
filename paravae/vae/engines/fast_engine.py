"""The fast PyTorch engine: folded networks, channels last, fused kernels, and a CUDA graph for each shape of image."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from paravae.vae.engines.base import Agree, HeadShare, Load
from paravae.vae.engines.graphs import GraphCache
from paravae.vae.engines.torch_engine import Networks, TorchEngine, cut, whole_of
from paravae.vae.engines.weight_state import WeightState
from paravae.vae.models.blocks import AttentionPart, FrameCache
from paravae.vae.models.flow import Flow, crop_flow
from paravae.vae.models.folded import FoldedDecoder, FoldedEncoder
from paravae.vae.models.stage import run_local
from paravae.vae.plan import Span, Window

Folded = TypeVar("Folded")


class FastEngine(TorchEngine):
    """Implements ``engines.base.Engine`` with folded copies of the networks, made anew when their weights change.

    ``everywhere``: also where the plain engine is as good, in fp32 and fp64 and on a CPU. Otherwise those take it.
    ``graphs``: how many CUDA graphs to keep. The copies take a third as much memory as the weights they stand for;
    a video's take as much again.
    """

    def __init__(self, networks: Networks, *, everywhere: bool, graphs: int) -> None:
        super().__init__(networks)
        self._everywhere = everywhere
        self.graphs = GraphCache(graphs)
        self._fast_decoder = _Copy(
            (networks.post_quant_conv, networks.decoder),
            lambda: FoldedDecoder(*self._decoder_parts()),
            self.graphs.clear,
        )
        self._fast_encoder = _Copy(
            (networks.encoder, networks.quant_conv),
            lambda: FoldedEncoder(*self._encoder_parts()),
            self.graphs.clear,
        )

    def decode(
        self, latents: Tensor, trace: Sequence[Window], *, as_uint8: bool = False, head: HeadShare | None = None
    ) -> Iterator[Tensor]:
        self._decoder_parts()
        if not self._is_for(latents):
            yield from super().decode(latents, trace, as_uint8=as_uint8, head=head)
            return
        decoder, trace = self._fast_decoder.up_to_date(), tuple(trace)
        front, part = self._head_plan(self.decoder_front, latents, trace[0], head)

        def attended(frame: Tensor, cache: FrameCache | None) -> Flow:
            given = run_local(decoder.front(), cut(frame, front[0]), front, cache, crop_flow)
            return _attended(decoder, given, part, head, trace[0])

        def pixels_of(frame: Tensor, cache: FrameCache | None) -> Tensor:
            # The head's flow gets no name here: it would be held to the end, in the way of what is larger.
            return run_local(decoder.tail(as_uint8=as_uint8), attended(frame, cache), trace, cache, crop_flow)

        def head_alone(frame: Tensor, cache: FrameCache | None) -> Tensor:
            attended(frame, cache)
            return frame

        run = pixels_of if trace[-1].area else head_alone
        for index, piece in enumerate(self._run(run, latents.split(1, dim=2))):
            yield piece.contiguous() if trace[-1].area else self.no_pixels(latents, index, as_uint8)

    def encode_window(self, pixels: Tensor, trace: Sequence[Window]) -> Iterator[Tensor]:
        self._encoder_parts()
        if not self._is_for(pixels):
            yield from super().encode_window(pixels, trace)
            return
        encoder, trace = self._fast_encoder.up_to_date(), tuple(trace)

        def features_of(piece: Tensor, cache: FrameCache | None) -> Tensor:
            flow = run_local(encoder.body(), cut(piece, trace[0]), trace, cache, crop_flow)
            assert isinstance(flow, Flow)
            return flow.total().movedim(-1, 1).contiguous()

        yield from self._run(features_of, self._pieces(pixels))

    def encode_features(self, features: Tensor, head: HeadShare | None = None) -> Tensor:
        self._encoder_parts()
        if not self._is_for(features):
            return super().encode_features(features, head)
        encoder = self._fast_encoder.up_to_date()
        front, part = self._head_plan(self.encoder_front, features, whole_of(features), head)

        def moments_of(frame: Tensor, cache: FrameCache | None) -> Tensor:
            own = cut(frame, front[0]).movedim(1, -1).clone(memory_format=torch.contiguous_format)
            given = run_local(encoder.front(), Flow(own), front, cache, crop_flow)
            return encoder.last(_attended(encoder, given, part, head, whole_of(frame)), cache)

        return torch.cat(list(self._run(moments_of, features.split(1, dim=2))), dim=2)

    def call(
        self, load: Load, key: Hashable, function: Callable[[Tensor], Tensor], value: Tensor, agree: Agree
    ) -> Tensor:
        """A CUDA graph by key and shape, from the second call on."""
        if not self._is_for(value):
            return super().call(load, key, function, value, agree)
        copy: _Copy[Any] = self._fast_decoder if load.half == "decoder" else self._fast_encoder
        copy.up_to_date()  # or else the graphs go
        key = (load.half, key, value.shape, value.dtype, value.device)
        return self.graphs.run(key, function, value, agree, lambda: self._working(load, value))

    def repeats(self, call: Callable[[], None]) -> bool:
        return self.graphs.repeats(call)

    def kind(self, dtype: torch.dtype, device: torch.device) -> str:
        return "fast" if self._takes(dtype, device) else super().kind(dtype, device)

    def estimated_bytes(self, load: Load, dtype: torch.dtype, device: torch.device, *, stream: bool) -> int:
        """A lone frame takes the three tensors of ``_largest_bytes``; with the folded weights and the result an H200
        held 0.99 to 1.04 of it. A stream was measured at 0.9 of the plain engine's."""
        if stream or not self._takes(dtype, device):
            return super().estimated_bytes(load, dtype, device, stream=stream)
        return sum(self._largest_bytes(load, dtype.itemsize))

    def _working(self, load: Load, value: Tensor) -> tuple[int, ...]:
        """Bytes of all that a recorded call is to find room for beforehand."""
        largest = self._largest_bytes(load, value.element_size())
        return (*largest, load.kept_bytes) if load.kept_bytes else largest

    def _largest_bytes(self, load: Load, value_bytes: int) -> tuple[int, ...]:
        """Of the largest tensors of a lone frame: the stream, what a convolution reads, what it writes. One of them is
        to have room for one more row and column in the encoder, for a convolution that halves the size."""
        largest, given = value_bytes * self._peak_values(load), load.trace[0]
        if load.half == "decoder" or not given.area:
            return largest, largest, largest
        return largest, largest, -(-largest * (given.rows.size + 1) * (given.cols.size + 1) // given.area)

    def _run(
        self, function: Callable[[Tensor, FrameCache | None], Tensor], pieces: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """``function`` of the pieces of a stream."""
        cache = self._stream(len(pieces))
        for piece in pieces:
            with _tuned_convolutions():  # not around the yield: the setting is the process's
                result = function(piece, cache)
            yield result

    def _is_for(self, value: Tensor) -> bool:
        """Gradients are the plain engine's: the fused kernels have none."""
        if torch.is_grad_enabled() and (value.requires_grad or self._any_parameter_needs_grad()):
            return False
        return self._takes(value.dtype, value.device)

    def _takes(self, dtype: torch.dtype, device: torch.device) -> bool:
        return self._everywhere or (device.type == "cuda" and dtype in (torch.float16, torch.bfloat16))

    def _any_parameter_needs_grad(self) -> bool:
        return self._fast_decoder.needs_grad() or self._fast_encoder.needs_grad()


class _Copy(Generic[Folded]):
    """A folded copy of some modules, made when first asked for and again when a weight has changed."""

    def __init__(
        self, modules: Sequence[nn.Module | None], make: Callable[[], Folded], when_changed: Callable[[], None]
    ) -> None:
        self._weights = WeightState(modules)
        self._make, self._when_changed = make, when_changed
        self._copy: Folded | None = None
        self._made_from: list[tuple[int, int]] = []

    def up_to_date(self) -> Folded:
        now = self._weights.now()
        if self._copy is None or now != self._made_from:
            if self._copy is not None:
                self._copy = None
                self._when_changed()
            with torch.no_grad():
                self._copy = self._make()
            self._made_from = now
        return self._copy

    def needs_grad(self) -> bool:
        return any(parameter.requires_grad for parameter in self._weights.parameters())


def _tuned_convolutions() -> AbstractContextManager[None]:
    """cuDNN tries its algorithms at the first call of each shape and keeps the fastest."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=True, deterministic=False, allow_tf32=cudnn.allow_tf32)


def _attended(
    network: FoldedDecoder | FoldedEncoder, given: Any, part: AttentionPart, head: HeadShare | None, wanted: Window
) -> Flow:
    """What the attention gives for the window ``wanted``, of what it is given for ``part.given``."""
    assert isinstance(given, Flow)
    flow = network.attention(given, part)
    if head is None:
        return flow
    # Stream and branch apart: their sum, rounded before it travels, would be another than that of one rank alone.
    assert isinstance(flow.branch, Tensor)
    flow = Flow(head.gather(flow.x, 2), flow.bias, head.gather(flow.branch, 2))
    return flow.cropped(Window(Span(0, flow.x.shape[2]), Span(0, flow.x.shape[3])), wanted)
