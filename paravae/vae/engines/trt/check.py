"""Whether an ONNX file computes what PyTorch does: both run on the CPU, on the same values.

What is compared with is the plain networks in float32, with weights and input rounded to the graph's dtype. PyTorch
in float16 is slow on a CPU and no truth to hold anything to; and ONNX Runtime, whose CPU provider has hardly a
float16 kernel, computes a float16 graph in float32 between casts. So this checks the graph, its constants and its
casts; what a GPU's 16-bit arithmetic adds is for ``paravae engine verify`` to say, where there is one.
A bfloat16 graph ONNX Runtime cannot run at all (it has no such convolution): its twin is run, which is the same file
with every bfloat16 made float32, the rounded weights kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paravae.vae.engines.trt.export import needed
from paravae.vae.engines.trt.parts import PORTS, ExportedVAE, ExportOptions, Part
from paravae.vae.models.blocks import CausalConv3d
from paravae.vae.models.decoder import Decoder
from paravae.vae.models.encoder import Encoder

_ALLOWED = {"float16": 1e-3, "bfloat16": 1e-5, "float32": 1e-5}
"""Largest error as a part of the largest magnitude, or of 1 if that is less."""


@dataclass(frozen=True)
class Checked:
    """``max_error`` at one ``size`` (height, width) of the input, in the output's own unit; pixels span 2.

    Of levels 0..255: by how much they miss the nearest to what they should be, in the same unit as float pixels.
    """

    size: tuple[int, int]
    max_error: float
    allowed: float


def check_onnx(
    path: Path, vae: ExportedVAE, part: Part, options: ExportOptions, sizes: Sequence[tuple[int, int]], batch: int = 1
) -> list[Checked]:
    """Run ``path``, which ``export_onnx`` wrote, at each of ``sizes``, and compare: see the head of this file.

    Raises:
        ValueError: an error exceeds what is allowed, or is no number; or ONNX Runtime refuses the graph or a size.
    """
    graph = OnnxGraph(path)
    plain = PlainNetwork(vae, part, options)
    found = []
    for size in sizes:
        fed = plain.example(size, batch)
        try:
            given = graph(fed)
        except Exception as error:  # ONNX Runtime's own kinds
            raise ValueError(f"{path}: ONNX Runtime cannot run {part} at {size[0]} x {size[1]}: {error}") from error
        wanted = plain(fed)
        checked = Checked(size, _error(given, wanted), _ALLOWED[options.dtype] * max(1.0, float(wanted.abs().max())))
        if not checked.max_error <= checked.allowed:
            raise ValueError(
                f"{path}: {part} in {options.dtype} at {size[0]} x {size[1]} differs from PyTorch by "
                f"{checked.max_error:.3g}, allowed are {checked.allowed:.3g}: torch {torch.__version__} exported "
                "another network; do not build an engine from it"
            )
        found.append(checked)
    return found


def _error(given: Tensor, wanted: Tensor) -> float:
    """Largest difference; levels are off by half a one where a value lies half-way between two."""
    if given.dtype != torch.uint8:
        return float((given.double() - wanted.double()).abs().max())
    exact_levels = wanted.permute(0, 2, 3, 1).double() * 127.5 + 127.5
    return max(0.0, float((given.double() - exact_levels).abs().max()) - 0.5) / 127.5


class OnnxGraph:
    """A graph of one input and one output in ONNX Runtime, on the CPU. bfloat16 runs, and is given, in float32."""

    def __init__(self, path: Path) -> None:
        onnx, runtime = needed("onnx"), needed("onnxruntime")
        model = onnx.load(path)
        in_float32(model)
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch's threads want the cores too
        self._session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (self._input,), (self._output,) = self._session.get_inputs(), self._session.get_outputs()

    def __call__(self, fed: Tensor) -> Tensor:
        value = fed.to({"tensor(float16)": torch.float16, "tensor(float)": torch.float32}[self._input.type])
        (given,) = self._session.run([self._output.name], {self._input.name: value.numpy()})
        return torch.from_numpy(given)


def in_float32(model: Any) -> None:
    """Make float32 of every bfloat16 in a ModelProto, in place, values kept."""
    onnx = needed("onnx")
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    graph = model.graph
    tensors = list(graph.initializer)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.name == "to" and attribute.i == narrow:
            attribute.i = wide
        if attribute.HasField("t"):
            tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_type == narrow:
            values = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide


class PlainNetwork:
    """``part`` as the plain networks compute it, in float32 on the CPU, with weights rounded to the graph's dtype.

    Takes and gives [B, C, H, W]; pixels are float, [-1, 1], whatever the graph's output.
    """

    def __init__(self, vae: ExportedVAE, part: Part, options: ExportOptions) -> None:
        self._part, self._options, self._arch = part, options, vae.config.arch_config
        is_decoder = part.startswith("decoder")
        self._network: Any = _rounded(vae.decoder if is_decoder else vae.encoder, options.torch_dtype)
        self._quant: Any = _rounded(vae.post_quant_conv if is_decoder else vae.quant_conv, options.torch_dtype)

    @torch.no_grad()
    def example(self, size: tuple[int, int], batch: int = 1) -> Tensor:
        """Values as they come there in use, of fixed seed, rounded to the graph's dtype, in float32."""
        generator = torch.Generator().manual_seed(size[0] * 4096 + size[1])
        takes = PORTS[self._part][0]
        channels = self._arch.input_channels if self._part.startswith("encoder") else self._arch.z_dim
        scale = self._arch.spatial_ratio if self._part == "encoder_head" else 1
        shape = (batch, channels, scale * size[0], scale * size[1])
        values = torch.randn(shape, generator=generator)
        if channels == self._arch.input_channels:
            values = values.clamp(-1, 1)
        elif self._arch.latents_std and not self._options.denormalize:
            values = self._denormalized(values)
        if takes == "features":
            values = self._head(values) if self._part == "decoder_tail" else self._body(values)
        return values.to(self._options.torch_dtype).float()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        part = self._part
        if self._options.denormalize:
            x = self._denormalized(x)
        if part in ("decoder", "decoder_head"):
            x = self._head(x)
        if part in ("decoder", "decoder_tail"):
            x = self._tail(x).clamp(-1, 1)
        if part in ("encoder", "encoder_body"):
            x = self._body(x)
        return self._moments(x) if part in ("encoder", "encoder_head") else x

    def _denormalized(self, z: Tensor) -> Tensor:
        """With constants in the graph's dtype, as ``AutoencoderKLQwenImage.denormalize`` has them."""
        mean, std = (
            torch.tensor(values).to(self._options.torch_dtype).float().view(-1, 1, 1)
            for values in (self._arch.latents_mean, self._arch.latents_std)
        )
        return z * std + mean

    def _head(self, latents: Tensor) -> Tensor:
        return self._network.head(self._quant(latents[:, :, None]))[:, :, 0]

    def _tail(self, features: Tensor) -> Tensor:
        return _run(self._network.tail(), features[:, :, None])[:, :, 0]

    def _body(self, pixels: Tensor) -> Tensor:
        return _run(self._network.body(), pixels[:, :, None])[:, :, 0]

    def _moments(self, features: Tensor) -> Tensor:
        x = self._network.attention(_run(self._network.front(), features[:, :, None]))
        return self._quant(self._network.last(x))[:, :, 0]


def _run(stages: Sequence[Any], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage.run(x, None)
    return x


def _rounded(module: Decoder | Encoder | CausalConv3d | None, dtype: torch.dtype) -> Any:
    assert module is not None
    return copy.deepcopy(module).to("cpu", dtype).float()
