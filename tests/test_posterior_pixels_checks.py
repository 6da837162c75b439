"""The small ones: the posterior against diffusers', pixel rounding, the check for NaN and Inf, memory estimates."""

from __future__ import annotations

import pytest
import torch

from paravae import Posterior
from paravae.vae.checks import FiniteCheck, check_gather_to
from paravae.vae.engines.base import Engine, Load
from paravae.vae.memory import device_bytes, free_bytes
from paravae.vae.pixels import from_uint8, psnr_db, to_uint8
from paravae.vae.plan import whole
from tests.builders import noise, small_vae


def test_posterior_is_diffusers() -> None:
    """Mode, deviation and, for a seed, the sample; log-variances beyond the clamp included."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = noise(2, 32, 3, 4, 5)
    moments[:, 16] = torch.tensor([-100.0, 100.0])[:, None, None, None]
    ours, theirs = Posterior.from_moments(moments), DiagonalGaussianDistribution(moments)
    assert torch.equal(ours.mode(), theirs.mode())
    assert torch.equal(ours.mean, theirs.mean)
    assert torch.equal(ours.logvar, theirs.logvar)
    assert (ours.logvar.min(), ours.logvar.max()) == (-30.0, 20.0)
    assert torch.equal(ours.std, theirs.std)
    a, b = (g.sample(generator=torch.Generator().manual_seed(7)) for g in (ours, theirs))
    assert torch.equal(a, b)
    assert not torch.equal(a, ours.sample(torch.Generator().manual_seed(8)))


def test_sample_follows_the_global_seed() -> None:
    posterior = Posterior(torch.zeros(1, 16, 1, 8, 8), torch.zeros(1, 16, 1, 8, 8))
    torch.manual_seed(5)
    sample = posterior.sample()
    torch.manual_seed(5)
    assert torch.equal(sample, torch.randn(1, 16, 1, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_256_levels_come_back(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = from_uint8(levels, dtype)
    assert pixels.dtype == dtype
    assert (pixels[0], pixels[-1]) == (-1.0, 1.0)
    assert torch.equal(to_uint8(pixels), levels)
    step = 2 / 255
    assert torch.equal(to_uint8(pixels + 0.49 * step), levels), "rounds to the nearest level"
    assert torch.equal(to_uint8(pixels - 0.49 * step), levels), "rounds to the nearest level"


def test_uint8_clamps_and_is_computed_wide() -> None:
    assert to_uint8(torch.tensor([-3.0, -1.001, 1.001, 9.0])).tolist() == [0, 0, 255, 255]
    narrow = torch.linspace(-1, 1, 999).to(torch.bfloat16)
    assert torch.equal(to_uint8(narrow), to_uint8(narrow.float()))
    assert (to_uint8(narrow).double() - (narrow.double() + 1) * 127.5).abs().max() <= 0.5 + 1e-5


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [([torch.nan], "1 NaN and 0 Inf"), ([torch.inf, -torch.inf], "0 NaN and 2 Inf"), ([torch.nan, torch.inf], "1 NaN")],
)
def test_finite_check_counts(spoilt: list[float], words: str) -> None:
    values = torch.zeros(3, 4)
    FiniteCheck("latents", values).raise_if_not()
    values.view(-1)[: len(spoilt)] = torch.tensor(spoilt)
    with pytest.raises(ValueError, match=f"latents hold {words}.* among 12 values, need finite numbers"):
        FiniteCheck("latents", values)


def test_estimated_bytes_by_hand() -> None:
    """The widest level of 8 channels has 8 x 8 pixels for each latent. Plain: four narrow and three wide copies a
    frame; a stream has 14 + 2 x 6 for each of its 4 frames. Fast, a lone frame: three tensors."""
    plain, fast = small_vae(engine="torch").engine, small_vae(engine="fast").engine
    trace = whole(plain.decoder_stages, 2, 3)
    largest = 8 * 6 * 64

    def bytes_of(engine: Engine, dtype: torch.dtype, images: int = 1, stream: bool = False) -> int:
        return engine.estimated_bytes(Load("decoder", trace, images), dtype, torch.device("cpu"), stream=stream)

    assert bytes_of(plain, torch.bfloat16) == largest * (4 * 2 + 3 * 4)
    assert bytes_of(plain, torch.float64, images=2) == 2 * largest * (4 * 8 + 3 * 8)
    assert bytes_of(plain, torch.float32, stream=True) == largest * (4 * (4 * 4 + 3 * 4) + (14 + 2 * 6) * 4)
    assert bytes_of(fast, torch.bfloat16, images=2) == 2 * largest * 3 * 2
    assert bytes_of(fast, torch.float32, stream=True) == bytes_of(plain, torch.float32, stream=True)


def test_who_may_receive() -> None:
    for fine in ("all", 0, 3):
        check_gather_to(fine, 4)
    for wrong in (4, -1, "none", 1.0, None):
        with pytest.raises(ValueError, match=r"gather_to is .*needs 'all' or a rank of the group, 0 to 3"):
            check_gather_to(wrong, 4)
    with pytest.raises(ValueError, match="0, the only rank"):
        check_gather_to(1, 1)


def test_device_bytes_of_the_cpu() -> None:
    assert 2**28 < device_bytes(torch.device("cpu")) < 2**50
    assert free_bytes(torch.device("cpu")) == device_bytes(torch.device("cpu"))


def test_psnr_by_hand() -> None:
    """A difference of a tenth of the range everywhere is 20 dB, in any range and dtype; none is infinite."""
    levels = torch.zeros(4, 5, dtype=torch.uint8)
    assert psnr_db(levels, levels + 10, 100) == pytest.approx(20)
    assert psnr_db(levels.bfloat16(), levels.double() - 0.2, 2) == pytest.approx(20)
    assert psnr_db(levels, levels, 255) == float("inf")
