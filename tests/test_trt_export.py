"""The networks as ONNX graphs: what they compute, what they are made of, and who can read them."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage, QwenImageVAEArchConfig
from paravae.launch.models import TINY
from paravae.vae import plan
from paravae.vae.engines.trt import export
from paravae.vae.engines.trt.check import OnnxGraph, PlainNetwork, check_onnx
from paravae.vae.engines.trt.export import export_onnx
from paravae.vae.engines.trt.parts import DTYPES, PARTS, PORTS, ExportOptions, Part, part_module
from paravae.vae.engines.trt.windows import window_fed, window_given
from paravae.vae.models.stage import crop
from tests.builders import SMALL, max_error, noise, pictures, small_vae

onnx = pytest.importorskip("onnx", reason="needs paravae[tensorrt]")
pytest.importorskip("onnxscript", reason="needs paravae[tensorrt]")
pytest.importorskip("onnxruntime", reason="needs paravae[tensorrt]")

LITTLE = QwenImageVAEArchConfig(base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temperal_downsample=(False,))
FULL = QwenImageVAEArchConfig()
SIZES = [(1, 1), (1, 2), (2, 1), (1, 16), (3, 5), (7, 2), (8, 8), (13, 31), (24, 24), (33, 20)]
LAT_SIZE = (61, 34)  # so many that windows have edges within the picture, for all that a halo is 13 latents wide
GRIDS = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2)]
FLOAT32 = ExportOptions("float32")
WHOLE: tuple[Part, ...] = ("decoder", "encoder")  # which are made of the other parts
LITTLE_PARTS = [*((part, "float16") for part in PARTS), *((part, "bfloat16") for part in WHOLE)]


def sizes_of(part: Part, ratio: int) -> list[tuple[int, int]]:
    """``SIZES`` of latents, as sizes of the part's input."""
    unit = ratio if PORTS[part][0] == "pixels" else 1
    return [(unit * height, unit * width) for height, width in SIZES]


@cache
def tiny() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(TINY)


@cache
def little() -> AutoencoderKLQwenImage:
    return small_vae(arch=LITTLE)


@pytest.fixture(scope="module")
def little_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``LITTLE_PARTS`` of a VAE of two levels, with all that goes into a graph before and after the network."""
    folder = tmp_path_factory.mktemp("little")
    for part, dtype in LITTLE_PARTS:
        path = folder / f"{part}_{dtype}.onnx"
        export_onnx(little(), part, path, options=all_in(part, dtype), size=(8, 10), dynamic=True)
    return folder


def all_in(part: Part, dtype: str) -> ExportOptions:
    return ExportOptions(dtype, denormalize=True, output="uint8").for_part(part)


# ------------------------------------------------------------------------------------------ what they compute


@pytest.mark.parametrize("part", PARTS)
def test_float32_graphs_compute_what_pytorch_does_at_every_size(part: Part, onnx_parts: Path) -> None:
    vae = small_vae()
    checked = check_onnx(onnx_parts / f"{part}.onnx", vae, part, FLOAT32, sizes_of(part, 8))
    assert len(checked) == 10
    assert max(one.max_error for one in checked) > 0  # two programs, not one


@pytest.mark.parametrize(("part", "dtype"), LITTLE_PARTS)
def test_16_bit_graphs_compute_what_pytorch_does_at_every_size(part: Part, dtype: str, little_parts: Path) -> None:
    checked = check_onnx(
        little_parts / f"{part}_{dtype}.onnx", little(), part, all_in(part, dtype), sizes_of(part, LITTLE.spatial_ratio)
    )
    assert [one.allowed >= (1e-3 if dtype == "float16" else 1e-5) for one in checked] == [True] * 10


def test_the_shipped_decoder_gives_the_levels_that_decode_gives(tmp_path: Path) -> None:
    """Against the public functions: normalised latents in, [B, H, W, 3] levels out."""
    vae, path = tiny(), tmp_path / "decoder.onnx"
    options = ExportOptions("float16", denormalize=True, output="uint8")
    export_onnx(vae, "decoder", path, options=options, size=(9, 14), dynamic=False, batch=2)
    assert check_onnx(path, vae, "decoder", options, [(9, 14)], batch=2)
    latents = noise(2, 16, 1, 9, 14).half()
    levels = OnnxGraph(path)(latents[:, :, 0])
    wanted = vae.decode(vae.denormalize(latents.float()), output_type="uint8")[:, :, 0].permute(0, 2, 3, 1)
    assert levels.dtype == torch.uint8
    difference = (levels.int() - wanted.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.1  # float16 against float32
    assert wanted.float().std() > 20


def test_plain_networks_of_a_check_are_the_models(onnx_parts: Path) -> None:
    """What graphs are compared with is what ``decode`` and ``encode`` give."""
    vae = small_vae()
    latents, pixels = noise(1, 16, 1, 5, 7), pictures(1, 3, 1, 24, 40)
    assert max_error(PlainNetwork(vae, "decoder", FLOAT32)(latents[:, :, 0]), vae.decode(latents)[:, :, 0]) < 1e-6
    moments = PlainNetwork(vae, "encoder", FLOAT32)(pixels[:, :, 0])
    assert max_error(moments[:, :16], vae.encode(pixels).mode()[:, :, 0]) < 1e-6
    assert max_error(OnnxGraph(onnx_parts / "encoder.onnx")(pixels[:, :, 0])[:, :16], moments[:, :16]) < 1e-5


@pytest.mark.parametrize("grid", GRIDS)
def test_head_and_windowed_tails_give_the_whole_picture(grid: tuple[int, int], onnx_parts: Path) -> None:
    head, tail, decoder = graphs(onnx_parts, "decoder_head", "decoder_tail", "decoder")
    latents = noise(1, 16, *LAT_SIZE)
    pixels = torch.full((1, 3, *(8 * n for n in LAT_SIZE)), math.nan)
    run_windows(tail, small_vae().engine.decoder_stages, grid, head(latents), pixels)
    assert max_error(pixels, decoder(latents)) < 1e-5
    assert pixels.std() > 0.05


@pytest.mark.parametrize("grid", GRIDS)
def test_windowed_bodies_and_head_give_the_whole_moments(grid: tuple[int, int], onnx_parts: Path) -> None:
    body, head, encoder = graphs(onnx_parts, "encoder_body", "encoder_head", "encoder")
    engine, pixels = small_vae().engine, pictures(1, 3, *(8 * n for n in LAT_SIZE))
    features = torch.full((1, engine.feature_channels, *LAT_SIZE), math.nan)
    run_windows(body, engine.encoder_stages, grid, pixels, features)
    assert max_error(head(features), encoder(pixels)) < 1e-5
    assert features.std() > 0.05


def graphs(folder: Path, *parts: Part) -> list[OnnxGraph]:
    return [OnnxGraph(folder / f"{part}.onnx") for part in parts]


def run_windows(part: OnnxGraph, stages: plan.Stages, grid: tuple[int, int], given: Tensor, whole: Tensor) -> None:
    """Fill ``whole`` with what the windows of one rank for each place in ``grid`` give."""
    ranks, size = math.prod(grid), (given.shape[2], given.shape[3])
    everything = plan.Window(*(plan.Span(0, n) for n in size))
    for trace in plan.plan_patches(stages, size, LAT_SIZE, grid, ranks).traces:
        fed, out = window_fed(stages, trace), trace[-1]
        assert ranks == 1 or fed != everything
        made = part(crop(given, everything, fed).contiguous())
        place = whole[..., out.rows.start : out.rows.stop, out.cols.start : out.cols.stop]
        place.copy_(crop(made, window_given(stages, fed), out))


def test_float_pixels_are_clamped(tmp_path: Path) -> None:
    vae, path = small_vae(arch=LITTLE), tmp_path / "tail.onnx"
    assert vae.decoder is not None
    vae.decoder.conv_out.bias.data.copy_(torch.tensor([3.0, 0.0, -3.0]))
    export_onnx(vae, "decoder_tail", path, options=FLOAT32, size=(4, 6), dynamic=False)
    check_onnx(path, vae, "decoder_tail", FLOAT32, [(4, 6)])
    red, _, blue = OnnxGraph(path)(noise(1, 16, 4, 6))[0]
    assert (red == 1).all()
    assert (blue == -1).all()


# ------------------------------------------------------------------------------------- what they are made of


def graph_of(path: Path) -> Any:
    """The graph with the shape and dtype of every value in it."""
    return onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph


def values_of(graph: Any) -> dict[str, Any]:
    known = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output, *graph.value_info)}
    return known | {tensor.name: tensor for tensor in graph.initializer}


def type_of(value: Any) -> str:
    return str(onnx.TensorProto.DataType.Name(getattr(value, "data_type", 0) or value.elem_type))


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_are_two_dimensional_and_strongly_typed(dtype: str, onnx_parts: Path, little_parts: Path) -> None:
    path = onnx_parts / "decoder.onnx" if dtype == "float32" else little_parts / f"decoder_{dtype}.onnx"
    own = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT"}[dtype]
    graph = graph_of(path)
    values, ops = values_of(graph), Counter(node.op_type for node in graph.node)
    taken = {"Conv", "Reshape", "Transpose", "Split", "MatMul", "Softmax", "Resize", "Shape", "Concat", "Cast", "Clip"}
    assert set(ops) <= taken | {"ReduceL2", "Div", "Mul", "Add", "Sigmoid", "Round"}  # no Slice, Gather, Pad, Attention
    assert (ops["MatMul"], ops["Softmax"]) == (2, 1)
    assert max(len(tensor.dims) for tensor in graph.initializer) == 4
    for node in graph.node:
        ranks = [len(values[name].shape.dim) for name in node.output if name in values]
        assert max(ranks, default=0) <= 4, node.name
        types = {type_of(values[name]) for name in node.input if name in values} - {"INT64"}  # axes and sizes
        if node.op_type in ("Conv", "MatMul", "Softmax", "Resize"):
            scales = {"FLOAT"} if node.op_type == "Resize" else set()
            assert {own} <= types <= {own} | scales, node.name
        if node.op_type in ("ReduceL2", "Div", "Sigmoid"):
            assert types == {"FLOAT"}, node.name
    (given,), (made,) = graph.input, graph.output
    assert (given.name, type_of(given.type.tensor_type)) == ("latents", own)
    assert (made.name, type_of(made.type.tensor_type)) == ("pixels", "FLOAT" if dtype == "float32" else "UINT8")


@pytest.mark.parametrize("part", WHOLE)
def test_files_hold_a_third_of_the_weights(part: Part, onnx_parts: Path) -> None:
    path, network = onnx_parts / f"{part}.onnx", getattr(small_vae(), part)
    weights = sum(
        p[:, :, -1].numel() if p.dim() == 5 else p.numel()
        for name, p in network.named_parameters()
        if "time_conv" not in name
    )
    stored = sum(math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer)
    assert weights <= stored <= 1.01 * weights + 1500  # and z's own convolution
    full_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
    assert path.stat().st_size < 0.45 * full_bytes  # of which biases and names are a part in so small a model


def test_equal_calls_write_equal_files_that_name_no_folder(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        export_onnx(little(), "encoder_head", tmp_path / name, options=FLOAT32, size=(4, 6), dynamic=True)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.onnx", "b.onnx"))
    assert first == second
    assert str(Path(export.__file__).parent).encode() not in first
    assert b".py" not in first


def test_static_graphs_take_one_size(tmp_path: Path) -> None:
    path = tmp_path / "head.onnx"
    export_onnx(little(), "decoder_head", path, options=FLOAT32, size=(3, 5), dynamic=False)
    (dims,) = [value.type.tensor_type.shape.dim for value in onnx.load(path).graph.input]
    assert [dim.dim_value for dim in dims] == [1, 16, 3, 5]
    assert "Shape" not in {node.op_type for node in onnx.load(path).graph.node}
    assert check_onnx(path, little(), "decoder_head", FLOAT32, [(3, 5)])[0].size == (3, 5)
    with pytest.raises(ValueError, match="cannot run decoder_head at 4 x 5"):
        check_onnx(path, little(), "decoder_head", FLOAT32, [(4, 5)])


def test_free_sizes_are_named_after_what_they_measure(onnx_parts: Path) -> None:
    graph = onnx.load(onnx_parts / "encoder_body.onnx").graph
    names = [[dim.dim_param for dim in port.type.tensor_type.shape.dim[2:]] for port in (*graph.input, *graph.output)]
    assert names == [["pixels_height", "pixels_width"], ["features_height", "features_width"]]


def test_tensorrt_parses_every_graph(onnx_parts: Path, little_parts: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
    files = [(onnx_parts / f"{part}.onnx", part, FLOAT32) for part in PARTS]
    files += [(little_parts / f"{part}_{dtype}.onnx", part, all_in(part, dtype)) for part, dtype in LITTLE_PARTS]
    for path, part, options in files:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(path.read_bytes()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
        given, made = network.get_input(0), network.get_output(0)
        assert (given.name, made.name) == PORTS[part]
        assert given.dtype.name == names[options.dtype]
        assert made.dtype.name == ("UINT8" if options.output == "uint8" else names[options.dtype])
        assert tuple(given.shape)[2:] == (-1, -1)
        assert sum(side == -1 for side in made.shape) == 2


# ------------------------------------------------------------------------------------------ what is refused


def test_a_graph_of_other_weights_is_refused(tmp_path: Path) -> None:
    other = small_vae(arch=LITTLE)
    options = ExportOptions("float16", output="uint8")
    path = tmp_path / "tail.onnx"
    export_onnx(other, "decoder_tail", path, options=options, size=(4, 6), dynamic=True)
    assert check_onnx(path, other, "decoder_tail", options, [(4, 6)])
    assert other.decoder is not None
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(0.005)  # less than a level
    with pytest.raises(ValueError, match=r"decoder_tail in float16 at 4 x 6 differs .*allowed are 0.001"):
        check_onnx(path, other, "decoder_tail", options, [(4, 6)])


def test_a_graph_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    other, path = small_vae(arch=LITTLE), tmp_path / "head.onnx"
    assert other.decoder is not None
    other.decoder.conv_in.bias.data.fill_(math.nan)
    export_onnx(other, "decoder_head", path, options=FLOAT32, size=(4, 6), dynamic=False)
    with pytest.raises(ValueError, match="differs from PyTorch by nan"):
        check_onnx(path, other, "decoder_head", FLOAT32, [(4, 6)])


@pytest.mark.parametrize(
    ("part", "options", "words"),
    [
        ("encoder", ExportOptions(denormalize=True), "encoder takes pixels and gives moments: it has no place for"),
        ("decoder_head", ExportOptions(output="uint8"), "decoder_head takes latents and gives features"),
        ("middle", ExportOptions(), "part is 'middle', needs one of decoder, encoder"),
    ],
)
def test_options_that_a_part_has_no_place_for(part: Any, options: ExportOptions, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        part_module(little(), part, options)


def test_other_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="dtype is 'float64', needs one of float16, bfloat16, float32"):
        ExportOptions("float64")
    path = tmp_path / "none.onnx"
    with pytest.raises(ValueError, match="pixels of 12 x 16: need multiples of 8"):
        export_onnx(small_vae(), "encoder_body", path, options=FLOAT32, size=(12, 16), dynamic=False)
    with pytest.raises(ValueError, match="0 x 4 x 4: batch, height and width start at 1"):
        export_onnx(little(), "decoder", path, options=FLOAT32, size=(4, 4), dynamic=False, batch=0)
    with pytest.raises(ValueError, match="built without its encoder"):
        export_onnx(small_vae(load_encoder=False), "encoder", path, options=FLOAT32, size=(8, 8), dynamic=False)
    bare = small_vae(arch=replace(LITTLE, latents_mean=(), latents_std=()))
    with pytest.raises(ValueError, match="needs latents_mean and latents_std"):
        part_module(bare, "decoder", ExportOptions(denormalize=True))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs onnxscript.*pip install 'paravae\[tensorrt\]'"):
        export_onnx(little(), "decoder", path, options=FLOAT32, size=(4, 4), dynamic=False)
    assert not list(tmp_path.iterdir())


def test_parts_share_the_weights_that_need_no_cut() -> None:
    vae = small_vae(arch=SMALL)
    assert vae.decoder is not None
    pointers = {parameter.data_ptr() for parameter in part_module(vae, "decoder", FLOAT32).parameters()}
    assert vae.decoder.attention.to_qkv.weight.data_ptr() in pointers
    assert not any(parameter.requires_grad for parameter in part_module(vae, "decoder", FLOAT32).parameters())


# ------------------------------------------------------------------------------------------------ full size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", WHOLE)
def test_full_size(part: Part, dtype: str, tmp_path: Path) -> None:
    vae, path, options = small_vae(arch=FULL), tmp_path / "part.onnx", ExportOptions(dtype)
    unit = 8 if part == "encoder" else 1
    export_onnx(vae, part, path, options=options, size=(16 * unit, 16 * unit), dynamic=True)
    check_onnx(path, vae, part, options, [(1 * unit, 1 * unit), (8 * unit, 13 * unit), (24 * unit, 16 * unit)])
    weights = {"decoder": 25.3e6, "encoder": 19.3e6}[part]
    assert path.stat().st_size == pytest.approx(weights * options.torch_dtype.itemsize, rel=0.02)
