"""The fast PyTorch engine: folded networks, channels last, fused kernels, and a CUDA graph for each shape of image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from paravae.vae.engines.graphs import GraphCache
from paravae.vae.engines.torch_engine import Networks, TorchEngine, cut, whole_of
from paravae.vae.models.blocks import FrameCache
from paravae.vae.models.flow import Flow, crop_flow
from paravae.vae.models.folded import FoldedDecoder, FoldedEncoder
from paravae.vae.models.stage import run_local
from paravae.vae.plan import Stages, Window, peak_elements

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

    def decode(self, latents: Tensor, trace: Sequence[Window], *, as_uint8: bool = False) -> Iterator[Tensor]:
        self._decoder_parts()
        if not self._is_for(latents):
            yield from super().decode(latents, trace, as_uint8=as_uint8)
            return
        decoder = self._fast_decoder.up_to_date()
        trace = tuple(trace)

        def pixels_of(frame: Tensor, cache: FrameCache | None) -> Tensor:
            def head() -> Flow | Tensor:
                return crop_flow(decoder.head(frame, cache), whole_of(frame), trace[0])

            # The head's flow gets no name here: it would be held to the end, in the way of what is larger.
            return run_local(decoder.tail(as_uint8=as_uint8), head(), trace, cache, crop_flow).contiguous()

        working = partial(_working, self.decoder_stages, trace, latents)
        yield from self._run(("decode", *_ends(trace), as_uint8), pixels_of, latents.split(1, dim=2), working)

    def encode_window(self, pixels: Tensor, trace: Sequence[Window]) -> Iterator[Tensor]:
        self._encoder_parts()
        if not self._is_for(pixels):
            yield from super().encode_window(pixels, trace)
            return
        encoder = self._fast_encoder.up_to_date()
        trace = tuple(trace)

        def features_of(piece: Tensor, cache: FrameCache | None) -> Tensor:
            flow = run_local(encoder.body(), cut(piece, trace[0]), trace, cache, crop_flow)
            assert isinstance(flow, Flow)
            return flow.total().movedim(-1, 1).contiguous()

        working = partial(_working, self.encoder_stages, trace, pixels, padded=trace[0])
        yield from self._run(("encode", *_ends(trace)), features_of, self._pieces(pixels), working)

    def encode_features(self, features: Tensor) -> Tensor:
        self._encoder_parts()
        if not self._is_for(features):
            return super().encode_features(features)
        encoder = self._fast_encoder.up_to_date()
        return torch.cat(list(self._run(("moments",), encoder.head, features.split(1, dim=2))), dim=2)

    def _run(
        self,
        key: tuple[object, ...],
        function: Callable[[Tensor, FrameCache | None], Tensor],
        pieces: Sequence[Tensor],
        working: Callable[[], Sequence[int]] = tuple,
    ) -> Iterator[Tensor]:
        """``function`` of the pieces of a stream; a lone piece goes through the graphs."""

        def tuned(piece: Tensor, cache: FrameCache | None) -> Tensor:
            with _tuned_convolutions():  # not around the yields: the setting is the process's
                return function(piece, cache)

        if len(pieces) == 1:
            key = (*key, pieces[0].shape, pieces[0].dtype, pieces[0].device)
            yield self.graphs.run(key, lambda piece: tuned(piece, None), pieces[0], working)
            return
        cache: FrameCache = {}
        for piece in pieces:
            yield tuned(piece, cache)

    def _is_for(self, value: Tensor) -> bool:
        """Gradients are the plain engine's: the fused kernels have none."""
        if torch.is_grad_enabled() and (value.requires_grad or self._any_parameter_needs_grad()):
            return False
        return self._everywhere or (value.is_cuda and value.dtype in (torch.float16, torch.bfloat16))

    def _any_parameter_needs_grad(self) -> bool:
        return self._fast_decoder.needs_grad() or self._fast_encoder.needs_grad()


class _Copy(Generic[Folded]):
    """A folded copy of some modules, made when first asked for and again when a weight has changed."""

    def __init__(
        self, modules: Sequence[nn.Module | None], make: Callable[[], Folded], when_changed: Callable[[], None]
    ) -> None:
        parts = [part for module in modules if module is not None for part in module.modules()]
        self._tables = [part._parameters for part in parts]  # looked at for every decode: traversal would take longer
        self._make, self._when_changed = make, when_changed
        self._copy: Folded | None = None
        self._made_from: list[tuple[int, int]] = []

    def up_to_date(self) -> Folded:
        now = [(parameter.data_ptr(), parameter._version) for parameter in self._parameters()]
        if self._copy is None or now != self._made_from:
            if self._copy is not None:
                self._copy = None
                self._when_changed()
            with torch.no_grad():
                self._copy = self._make()
            self._made_from = now
        return self._copy

    def needs_grad(self) -> bool:
        return any(parameter.requires_grad for parameter in self._parameters())

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for table in self._tables for parameter in table.values() if parameter is not None)


def _tuned_convolutions() -> AbstractContextManager[None]:
    """cuDNN tries its algorithms at the first call of each shape and keeps the fastest."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=True, deterministic=False, allow_tf32=cudnn.allow_tf32)


def _ends(trace: Sequence[Window]) -> tuple[Window, Window]:
    """What tells the traces of one size of picture apart: the windows between follow from the last."""
    return trace[0], trace[-1]


def _working(stages: Stages, trace: Sequence[Window], value: Tensor, padded: Window | None = None) -> tuple[int, ...]:
    """Bytes of the largest tensors of a lone frame: the stream, what a convolution reads, what it writes. One of them
    is to have room for one more row and column than ``padded``, for a convolution that halves the size."""
    largest = value.shape[0] * peak_elements(stages, trace) * value.element_size()
    if padded is None or not padded.area:
        return largest, largest, largest
    return largest, largest, -(-largest * (padded.rows.size + 1) * (padded.cols.size + 1) // padded.area)
