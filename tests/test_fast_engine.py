"""The fast engine computes what the plain one does: on the CPU with the references, and with the kernels in Triton's
interpreter. On a GPU see test_cuda.py."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage, QwenImageVAEArchConfig, QwenImageVAEConfig
from paravae.layers import references_only
from paravae.layers.norm_silu import norm_silu
from paravae.vae import plan
from paravae.vae.engines import fast_engine
from paravae.vae.engines.fast_engine import FastEngine
from paravae.vae.engines.torch_engine import TorchEngine
from paravae.vae.plan import Span, Window
from tests.builders import SMALL, max_error, noise, perturb, pictures, small_vae

BOUNDS = {torch.float32: 2e-5, torch.float64: 2e-7}  # the plain network's upsampling rounds fp64 to fp32
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=["fp32", "fp64"])
SHAPES = [(1, 1, 5, 7), (2, 1, 1, 1), (1, 3, 5, 4), (2, 2, 1, 3)]  # B, T, h, w
shapes = pytest.mark.parametrize("shape", SHAPES, ids=["image", "one-latent", "video", "strip"])


def pair(dtype: torch.dtype, **options: object) -> tuple[AutoencoderKLQwenImage, AutoencoderKLQwenImage]:
    """The same model with the plain and with the fast engine."""
    return small_vae(dtype, engine="torch", **options), small_vae(dtype, engine="fast", **options)


@pytest.fixture(autouse=True)
def kernels_off(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """The interpreter is slow: tests marked ``interpreted`` pay for it, the others take the references."""
    if request.node.get_closest_marker("interpreted"):
        yield
        return
    with references_only():
        yield


# base_dim 24 has levels of 96 channels, whose convolutions are fused with what follows them.
WIDTHS = pytest.mark.parametrize("base_dim", [8, 24])


@WIDTHS
@DTYPES
@shapes
def test_decode(shape: tuple[int, ...], dtype: torch.dtype, base_dim: int) -> None:
    plain, fast = pair(dtype, arch=QwenImageVAEArchConfig(base_dim=base_dim))
    latents = noise(shape[0], 16, *shape[1:], dtype=dtype)
    pixels = fast.decode(latents)
    assert pixels.dtype == dtype
    assert pixels.is_contiguous()
    assert pixels.std() > 0.05
    assert max_error(pixels, plain.decode(latents)) <= BOUNDS[dtype]
    levels = fast.decode(latents, output_type="uint8")
    assert levels.dtype == torch.uint8
    assert max_error(levels, plain.decode(latents, output_type="uint8")) <= 1


@WIDTHS
@DTYPES
@shapes
def test_encode(shape: tuple[int, ...], dtype: torch.dtype, base_dim: int) -> None:
    plain, fast = pair(dtype, arch=QwenImageVAEArchConfig(base_dim=base_dim))
    batch, frames, height, width = shape
    pixels = pictures(batch, 3, 4 * frames - 3, 8 * height, 8 * width, dtype=dtype)
    posterior, truth = fast.encode(pixels), plain.encode(pixels)
    assert posterior.mean.std() > 0.01
    assert max_error(posterior.mean, truth.mean) <= BOUNDS[dtype]
    assert max_error(posterior.logvar, truth.logvar) <= BOUNDS[dtype]


@WIDTHS
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(
    "window", [Window(Span(8, 24), Span(16, 40)), Window(Span(0, 8), Span(0, 72)), Window(Span(33, 34), Span(70, 72))]
)
def test_windows_of_a_decode(window: Window, frames: int, base_dim: int) -> None:
    """The window calculus of the patch mode: what a rank is owed, cropped after every layer."""
    plain, fast = pair(torch.float32, arch=QwenImageVAEArchConfig(base_dim=base_dim))
    latents = noise(2, 16, frames, 5, 9)
    trace = plan.trace_window(plain.engine.decoder_stages, window, 5, 9)
    with torch.no_grad():
        pieces = list(zip(fast.engine.decode(latents, trace), plain.engine.decode(latents, trace), strict=True))
    assert len(pieces) == frames
    for mine, truth in pieces:
        assert mine.shape[-2:] == (window.rows.size, window.cols.size)
        assert max_error(mine, truth) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("frames", [1, 5])
def test_windows_of_an_encode(frames: int) -> None:
    plain, fast = pair(torch.float32)
    pixels = pictures(2, 3, frames, 40, 72)
    trace = plan.trace_window(plain.engine.encoder_stages, Window(Span(1, 4), Span(2, 9)), 40, 72)
    with torch.no_grad():
        pieces = zip(fast.engine.encode_window(pixels, trace), plain.engine.encode_window(pixels, trace), strict=True)
        assert all(max_error(mine, truth) <= BOUNDS[torch.float32] for mine, truth in pieces)


@pytest.mark.interpreted
@pytest.mark.parametrize("base_dim", [16, 24])
def test_with_the_kernels(base_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end, every kernel in the interpreter; channels that are one power of two and that are two."""
    pytest.importorskip("triton", reason="Triton is not installed")
    ran = []
    kernel = norm_silu.kernel
    monkeypatch.setattr(norm_silu, "kernel", lambda *args, **kwargs: ran.append(1) or kernel(*args, **kwargs))
    plain, fast = pair(torch.float32, arch=QwenImageVAEArchConfig(base_dim=base_dim))
    latents = noise(1, 16, 1, 2, 3)
    assert max_error(fast.decode(latents), plain.decode(latents)) <= BOUNDS[torch.float32]
    assert len(ran) > 30
    pixels = pictures(1, 3, 1, 16, 24)
    assert max_error(fast.encode(pixels).mean, plain.encode(pixels).mean) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_as_precise_as_plain_pytorch(dtype: torch.dtype) -> None:
    """Against fp64, the fast engine errs no more than the plain one does in the same dtype."""
    exact = small_vae(torch.float64, engine="torch")
    rounded = copy.deepcopy(exact).to(dtype)
    latents = noise(1, 16, 1, 12, 12, dtype=dtype)
    truth = rounded.double().decode(latents.double())

    def rms(pixels: Tensor) -> float:
        return float((pixels.double() - truth).square().mean().sqrt())

    plain, fast = pair(torch.float64)
    ours, theirs = rms(fast.to(dtype).decode(latents)), rms(plain.to(dtype).decode(latents))
    assert theirs > 1e-5
    assert ours <= 1.05 * theirs


def test_auto_takes_the_fast_engine_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and in fp32, auto runs the plain networks, to the bit."""
    plain, auto = small_vae(engine="torch"), small_vae()
    assert auto.config.engine == "auto"
    assert type(plain.engine) is TorchEngine
    assert type(auto.engine) is FastEngine
    monkeypatch.setattr(fast_engine, "FoldedDecoder", None)
    monkeypatch.setattr(fast_engine, "FoldedEncoder", None)
    latents, pixels = noise(1, 16, 1, 3, 4), pictures(1, 3, 1, 16, 16)
    assert torch.equal(auto.decode(latents), plain.decode(latents))
    assert torch.equal(auto.encode(pixels).mean, plain.encode(pixels).mean)


def test_new_weights_are_noticed() -> None:
    """Loaded, assigned, changed in place or moved to another dtype: the folded copies follow."""
    plain, fast = pair(torch.float32)
    latents = noise(1, 16, 1, 3, 3)
    seen = [fast.decode(latents)]

    def check(bound: float = 2e-5) -> None:
        assert max_error(fast.decode(latents), plain.decode(latents)) <= bound
        assert all(max_error(fast.decode(latents).float(), other.float()) > 1e-3 for other in seen)
        seen.append(fast.decode(latents))

    perturb(plain)
    fast.load_state_dict(plain.state_dict())
    check()
    perturb(plain)
    fast.load_state_dict({key: value.clone() for key, value in plain.state_dict().items()}, assign=True)
    check()
    with torch.no_grad():
        for vae in (plain, fast):
            vae.decoder.conv_out.weight.mul_(-1)
    check()
    plain.double(), fast.double()
    assert fast.decode(latents.double()).dtype == torch.float64
    assert max_error(fast.decode(latents.double()), plain.decode(latents.double())) <= 2e-7


def test_copies_are_kept_while_weights_are() -> None:
    fast = small_vae(engine="fast")
    engine = fast.engine
    assert isinstance(engine, FastEngine)
    fast.decode(noise(1, 16, 1, 2, 2))
    copy_of = engine._fast_decoder.up_to_date()
    fast.decode(noise(1, 16, 1, 3, 2))
    assert engine._fast_decoder.up_to_date() is copy_of


def test_input_is_left_alone() -> None:
    fast = small_vae(engine="fast")
    latents, pixels = noise(2, 16, 2, 3, 3), pictures(1, 3, 5, 16, 16)
    before = latents.clone(), pixels.clone()
    fast.decode(latents)
    fast.encode(pixels)
    assert torch.equal(latents, before[0])
    assert torch.equal(pixels, before[1])


def test_gradients_take_the_plain_networks() -> None:
    """The kernels have none, so what needs gradients is not run by them."""
    plain, fast = pair(torch.float64)
    trace = plan.whole(plain.engine.decoder_stages, 2, 3)
    grads = []
    for vae in (plain, fast):
        latents = noise(1, 16, 1, 2, 3, dtype=torch.float64).requires_grad_()
        next(vae.engine.decode(latents, trace)).square().sum().backward()
        grads.append(latents.grad)
    assert torch.equal(*grads)  # type: ignore[arg-type]


def test_a_setting_of_the_process_is_put_back() -> None:
    """Tuned convolutions are this engine's, also between the frames of a stream that is left unfinished."""
    fast = small_vae(engine="fast")
    assert not torch.backends.cudnn.benchmark
    latents = noise(1, 16, 3, 2, 2)
    stream = fast.engine.decode(latents, plan.whole(fast.engine.decoder_stages, 2, 2))
    with torch.no_grad():
        next(stream)
        assert not torch.backends.cudnn.benchmark
        next(stream)
    assert not torch.backends.cudnn.benchmark


def test_other_architectures() -> None:
    options = {"base_dim": 4, "z_dim": 6, "dim_mult": (1, 2, 2, 4), "num_res_blocks": 1}
    arch = QwenImageVAEArchConfig(**options, temperal_downsample=(True, False, True), latents_mean=(), latents_std=())
    plain, fast = pair(torch.float64, arch=arch)
    latents = noise(1, 6, 2, 3, 4, dtype=torch.float64)
    assert max_error(fast.decode(latents), plain.decode(latents)) <= 2e-7
    pixels = pictures(1, 3, 5, 16, 24, dtype=torch.float64)
    assert max_error(fast.encode(pixels).mean, plain.encode(pixels).mean) <= 2e-7


def test_half_a_vae() -> None:
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        vae = AutoencoderKLQwenImage(QwenImageVAEConfig(arch_config=SMALL, engine="fast", **{f"load_{other}": False}))
        assert getattr(vae, other) is None
        if half == "decoder":
            assert vae.decode(noise(1, 16, 1, 2, 2)).isfinite().all()
            with pytest.raises(ValueError, match="cannot encode"):
                list(vae.engine.encode_window(pictures(1, 3, 1, 8, 8), ()))
        else:
            assert vae.encode(pictures(1, 3, 1, 8, 8)).mean.isfinite().all()
            with pytest.raises(ValueError, match="cannot decode"):
                list(vae.engine.decode(noise(1, 16, 1, 2, 2), ()))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("engine", "quick", "'quick'.*auto, fast, torch"), ("cuda_graphs", -1, "-1.*0 or more")],
)
def test_config_checks_itself(field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(QwenImageVAEConfig(), **{field: value})
