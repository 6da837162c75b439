"""A part of the VAE -> an ONNX file that TensorRT parses, through torch's dynamo exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paravae.files import whole_file
from paravae.vae.engines.trt.parts import PORTS, ExportedVAE, ExportOptions, Part, input_channels, part_module

# The oldest that the exporter writes without converting, so that all of TensorRT 10 reads it; bfloat16 convolutions
# are in ONNX since 22 only.
_OPSETS = {"float16": 18, "bfloat16": 22, "float32": 18}


def export_onnx(
    vae: ExportedVAE,
    part: Part,
    path: Path,
    *,
    options: ExportOptions,
    size: tuple[int, int],
    dynamic: bool,
    batch: int = 1,
) -> None:
    """Write ``part`` of ``vae`` to ``path``, whole or not at all, and weights within; equal calls write equal bytes.

    Inputs and outputs: ``parts.Part``, named as in ``parts.PORTS``. Check the file with ``check.check_onnx``.

    Args:
        size: height and width of the part's input, in its own pixels, latents or features.
        dynamic: height and width are free in the graph; ``size`` is then only what the exporter traces with.

    Raises:
        ValueError: the VAE lacks that half, ``options`` hold what the part has no place for, sizes are below 1 or
            pixels no multiples of 8, or the packages of the extra ``paravae[tensorrt]`` are missing.
    """
    if min(*size, batch) < 1:
        raise ValueError(
            f"cannot export {part} for {batch} x {size[0]} x {size[1]}: batch, height and width start at 1"
        )
    unit = vae.config.arch_config.spatial_ratio if PORTS[part][0] == "pixels" else 1
    if size[0] % unit or size[1] % unit:
        raise ValueError(f"cannot export {part} for pixels of {size[0]} x {size[1]}: need multiples of {unit}")
    module = part_module(vae, part, options)
    if dynamic:  # torch takes a size of 1 for a constant
        size = (max(size[0], 2 * unit), max(size[1], 2 * unit))
    example = torch.zeros(batch, input_channels(vae, part), *size, dtype=options.torch_dtype)
    model = _exported(module, example, PORTS[part], _OPSETS[options.dtype], unit if dynamic else None)
    _tidy(model)
    if dynamic:
        _name_free_sizes(model.graph, channels_last=options.output == "uint8")
    needed("onnx").checker.check_model(model, full_check=True)
    with whole_file(path) as file:
        file.write_bytes(model.SerializeToString(deterministic=True))


def needed(name: str) -> Any:
    """One of the optional packages. Raises ValueError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"exporting for TensorRT needs {name}, which cannot be imported ({error}): pip install 'paravae[tensorrt]'"
        ) from error


def _exported(module: nn.Module, example: Tensor, ports: tuple[str, str], opset: int, unit: int | None) -> Any:
    """The ModelProto. ``unit``: height and width are free multiples of this; None: they are the example's."""
    needed("onnx")
    needed("onnxscript")
    free = None
    if unit is not None:
        height, width = torch.export.Dim("height", min=1), torch.export.Dim("width", min=1)
        free = ({2: unit * height, 3: unit * width} if unit > 1 else {2: height, 3: width},)
    with torch.no_grad(), _quiet():
        # Not left to torch.onnx.export: where this fails, torch 2.6's falls back to a trace, of fixed sizes.
        traced = torch.export.export(module, (example,), dynamic_shapes=free, strict=False)
        program = torch.onnx.export(
            traced,
            dynamo=True,
            input_names=[ports[0]],
            output_names=[ports[1]],
            opset_version=opset,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of a missing torchvision, of guards, and of its own use of what is deprecated."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _tidy(model: Any) -> None:
    """Drop what differs from machine to machine and from one torch to the next.

    The exporter notes Python's call stack, with paths, and the sizes of all between input and output, which are
    inferred where they are needed.
    """
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    graph.ClearField("value_info")


def _name_free_sizes(graph: Any, channels_last: bool) -> None:
    """latents_height, latents_width, ...: torch has names of its own, and torch 2.6 notes the example's sizes of what
    upsampling gives, though they are free."""
    (given,), (made,) = graph.input, graph.output
    for port, first in ((given, 2), (made, 1 if channels_last else 2)):
        dims = port.type.tensor_type.shape.dim
        if port is given and any(dim.HasField("dim_value") for dim in dims[2:]):
            raise ValueError(f"torch {torch.__version__} exported fixed sizes where free ones were asked for: {dims}")
        for dim, side in zip(dims[first:], ("height", "width"), strict=False):
            dim.dim_param = f"{port.name}_{side}"
