"""What must happen when something is wrong on one rank or on all: prompt errors everywhere, and a sound next decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage, RankError
from paravae.vae.engines.base import Engine, HeadShare
from paravae.vae.plan import Window
from tests.builders import max_error, noise, pictures, small_vae
from tests.case_tools import TILE_FITS_GIB, TILES
from tests.ranks import Case, Rank

PROMPT_S = 10.0


def broken_on_purpose() -> NoReturn:
    raise RuntimeError("broken on purpose")


class BrokenEngine:
    """An engine that does its work but for one call, which ends with ``fail`` after ``good_steps`` steps."""

    def __init__(
        self, engine: Engine, broken: str, good_steps: int = 0, fail: Callable[[], object] = broken_on_purpose
    ) -> None:
        self._engine, self._broken, self._good_steps, self._fail = engine, broken, good_steps, fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def decode(self, latents: Tensor, trace: Sequence[Window], **options: Any) -> Iterator[Tensor]:
        return self._steps("decode", self._engine.decode(latents, trace, **options))

    def encode_window(self, pixels: Tensor, trace: Sequence[Window]) -> Iterator[Tensor]:
        return self._steps("encode_window", self._engine.encode_window(pixels, trace))

    def encode_features(self, features: Tensor, head: HeadShare | None = None) -> Tensor:
        if self._broken == "encode_features":
            self._fail()
        return self._engine.encode_features(features, head)

    def _steps(self, name: str, steps: Iterator[Tensor]) -> Iterator[Tensor]:
        for index, step in enumerate(steps):
            if self._broken == name and index >= self._good_steps:
                self._fail()
            yield step


def error_of(call: Callable[[], object]) -> Exception:
    """What ``call`` raises, promptly."""
    started = time.monotonic()
    try:
        call()
    except Exception as error:
        assert time.monotonic() - started < PROMPT_S, "the error came, but late"
        return error
    raise AssertionError("nothing was raised")


def expect(error: Exception, kind: type[Exception], *fragments: str) -> None:
    assert type(error) is kind, repr(error)
    missing = [fragment for fragment in fragments if fragment not in str(error)]
    assert not missing, f"{missing} not in: {error}"


def _vae(here: Rank, **options: Any) -> AutoencoderKLQwenImage:
    return small_vae(device=here.device, use_parallel_decode=True, **options)


def still_works(vae: AutoencoderKLQwenImage) -> None:
    """A decode and an encode with ``vae`` are right."""
    single = small_vae(device=vae.device)
    latents = noise(1, 16, 1, 5, 6, device=vae.device, seed=3)
    assert max_error(vae.parallel_patch_decode(latents), single.decode(latents)) <= 2e-5
    pixels = pictures(1, 3, 1, 40, 48, device=vae.device)
    assert max_error(vae.encode(pixels).mean, single.encode(pixels).mean) <= 2e-5


def one_rank_breaks(here: Rank, call: str, method: str, good_steps: int) -> str:
    victim = here.size - 1
    vae = _vae(here, tile_sample_min_height=64, tile_sample_stride_height=64)
    engine = vae.engine
    # A strip so long that every rank has some of it to do.
    value = pictures(1, 3, 5, 128 * here.size, 8, device=here.device)
    if method != "encode":
        value = noise(1, 16, 2, 8 * here.size, 1, device=here.device)
    if here.rank == victim:
        vae.use_engine(BrokenEngine(engine, call, good_steps))
    error = error_of(lambda: getattr(vae, method)(value))
    if here.rank == victim:
        expect(error, RuntimeError, "broken on purpose")
    else:
        expect(error, RankError, f"rank {victim} of {here.size} failed: RuntimeError: broken on purpose")
        assert isinstance(error, RankError)
        assert (error.rank, error.input_error) == (victim, False)
    vae.use_engine(engine)
    still_works(vae)
    return "fine"


def progress_raises(here: Rank) -> str:
    """A caller's own function that raises on one rank is that rank's failure."""
    vae = _vae(here)

    def refuse(done: int, total: int) -> None:
        raise KeyError("no bar")

    error = error_of(
        lambda: vae.parallel_patch_decode(
            noise(1, 16, 1, 6, 6, device=here.device), on_progress=refuse if here.rank == 0 else None
        )
    )
    if here.rank == 0:
        expect(error, KeyError, "no bar")
    else:
        expect(error, RankError, f"rank 0 of {here.size} failed: KeyError")
    still_works(vae)
    return "fine"


def stream_breaks(here: Rank, where: str) -> str:
    """A stream that fails on one rank ends on all, the frames before it delivered: its engine, or its caller."""
    victim = here.size - 1
    vae = _vae(here, parallel_decode_mode="patch")
    engine, taken = vae.engine, []
    if where == "engine" and here.rank == victim:
        vae.use_engine(BrokenEngine(engine, "decode", good_steps=1))

    def take(frames: Tensor) -> None:
        if where == "caller" and here.rank == victim and taken:
            raise KeyError("no room")
        taken.append(frames)

    latents = noise(1, 16, 3, 8 * here.size, 1, device=here.device)  # so long that every rank has some to do
    error = error_of(lambda: vae.decode(latents, on_frames=take))
    kind, words = (RuntimeError, "broken on purpose") if where == "engine" else (KeyError, "no room")
    if here.rank == victim:
        expect(error, kind, words)
        assert len(taken) == 1
    else:
        expect(error, RankError, f"rank {victim} of {here.size} failed: {kind.__name__}")
        assert len(taken) == (1 if where == "engine" else 2)
    vae.use_engine(engine)
    still_works(vae)
    return "fine"


def nan_on_one_rank(here: Rank, method: str) -> str:
    vae = _vae(here)
    latents = noise(1, 16, 1, 6, 6, device=here.device)
    if here.rank == 0:
        latents[0, 3, 0, 2, 2] = torch.nan
        latents[0, 3, 0, 2, 3] = torch.inf
    error = error_of(lambda: getattr(vae, method)(latents))
    if here.rank == 0:
        expect(error, ValueError, "latents hold 1 NaN and 1 Inf among 576 values")
    else:
        expect(error, RankError, f"rank 0 of {here.size} failed: ValueError: latents hold 1 NaN and 1 Inf")
        assert isinstance(error, RankError)
        assert (error.rank, error.input_error) == (0, True)
    still_works(vae)
    return "fine"


def ranks_disagree(here: Rank, about: str) -> str:
    """The ranks ask for different things, each fine in itself."""
    vae = _vae(here)
    config = vae.config
    odd = here.rank == here.size - 1
    if odd and about == "tiles":
        vae.config = replace(config, tile_sample_min_width=512)
    latents = noise(1, 16, 1, 4, 5 if odd and about == "shape" else 4, device=here.device)
    output_type = "uint8" if odd and about == "output" else "float"
    decode = vae.parallel_tiled_decode if odd and about == "mode" else vae.parallel_patch_decode
    error = error_of(lambda: decode(latents, output_type=output_type))
    words = {
        "shape": ("[1, 16, 1, 4, 4]", "[1, 16, 1, 4, 5]"),
        "output": ("float", "uint8"),
        "mode": ("patch", "tiled"),
        "tiles": ("256 x 256 px", "256 x 512 px"),
    }
    expect(error, RankError, "asked for different things: rank 0", f"rank {here.size - 1}", *words[about])
    assert isinstance(error, RankError)
    assert (error.rank, error.input_error) == (here.size - 1, True)
    vae.config = config
    still_works(vae)
    return "fine"


def bad_output_type_on_one_rank(here: Rank) -> str:
    vae = _vae(here)
    latents = noise(1, 16, 1, 4, 4, device=here.device)
    error = error_of(lambda: vae.decode(latents, output_type="int4" if here.rank == 0 else "float"))
    if here.rank == 0:
        expect(error, ValueError, "output_type is 'int4'", "float, uint8")
    else:
        expect(error, RankError, "rank 0", "output_type is 'int4'")
    still_works(vae)
    return "fine"


BAD_LATENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "four dimensions": ((1, 16, 4, 4), ("[1, 16, 4, 4]", "need [B, 16, T, h, w]", "T = 1")),
    "channels": ((1, 4, 1, 4, 4), ("[1, 4, 1, 4, 4]", "need [B, 16, T, h, w]")),
    "empty": ((1, 16, 1, 0, 4), ("[1, 16, 1, 0, 4]", ">= 1")),
}
BAD_PIXELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "four dimensions": ((1, 3, 16, 16), ("[1, 3, 16, 16]", "need [B, 3, F, H, W]", "F = 1")),
    "channels": ((1, 4, 1, 16, 16), ("[1, 4, 1, 16, 16]", "need [B, 3, F, H, W]")),
    "height": ((1, 3, 1, 20, 16), ("20 x 16", "multiples of 8", "16 x 16")),
    "width": ((1, 3, 1, 16, 31), ("16 x 31", "multiples of 8", "16 x 24")),
    "frames": ((1, 3, 7, 16, 16), ("7 frames", "1 + a multiple of 4", "5")),
}


def bad_input(here: Rank) -> str:
    """Every rank says what came and what is needed, the same."""
    vae = _vae(here)
    latents, pixels = noise(1, 16, 1, 4, 4, device=here.device), pictures(1, 3, 1, 16, 16, device=here.device)
    methods = (vae.decode, vae.parallel_patch_decode, vae.parallel_tiled_decode, vae.tiled_decode)
    for decode in methods:
        for shape, fragments in BAD_LATENTS.values():
            value = noise(*shape, device=here.device)
            expect(error_of(lambda d=decode, v=value: d(v)), ValueError, *fragments)
        wrong = latents.double()
        expect(error_of(lambda d=decode, v=wrong: d(v)), ValueError, "torch.float64", "torch.float32")
        expect(error_of(lambda d=decode: d([1.0])), ValueError, "list", "torch.Tensor")
        for value, words in ((torch.nan, "1 NaN and 0 Inf"), (torch.inf, "0 NaN and 1 Inf")):
            spoilt = latents.clone()
            spoilt[0, 0, 0, 0, 0] = value
            expect(error_of(lambda d=decode, v=spoilt: d(v)), ValueError, "latents hold", words, "finite")
        expect(error_of(lambda d=decode: d(latents, output_type="int4")), ValueError, "'int4'", "float, uint8")
    for shape, fragments in BAD_PIXELS.values():
        value = pictures(*shape, device=here.device)
        expect(error_of(lambda v=value: vae.encode(v)), ValueError, *fragments)
    expect(error_of(lambda: vae.encode(pixels.double())), ValueError, "torch.float64", "torch.float32")
    expect(error_of(lambda: vae.encode(pixels * torch.nan)), ValueError, "pixels hold 768 NaN", "finite")
    if here.device.type == "cuda":
        expect(error_of(lambda: vae.decode(latents.cpu())), ValueError, "latents are on cpu", "cuda")
    still_works(vae)
    return "fine"


def over_memory_limit(here: Rank) -> str:
    """Exact decodes over the limit are refused on every rank; tiles, and what fits, are not."""
    vae = _vae(here, parallel_decode_mode="patch", memory_limit_gib=TILE_FITS_GIB, **TILES)
    latents = noise(1, 16, 1, 32, 32, device=here.device)
    pixels = pictures(1, 3, 1, 256, 256, device=here.device)
    words = ("[1, 16, 1, 32, 32]", "GiB", "memory_limit_gib", "tiled")
    expect(error_of(lambda: vae.decode(latents)), ValueError, *words)
    expect(error_of(lambda: vae.parallel_patch_decode(latents)), ValueError, *words)
    expect(error_of(lambda: vae.encode(pixels)), ValueError, "[1, 3, 1, 256, 256]", "GiB", "memory_limit_gib")
    tiled = vae.parallel_tiled_decode(latents)
    assert torch.equal(tiled, vae.tiled_decode(latents))
    assert max_error(tiled, small_vae(device=here.device, **TILES).tiled_decode(latents)) <= 2e-5
    vae.config = replace(vae.config, memory_limit_gib=TILE_FITS_GIB / 2)
    expect(error_of(lambda: vae.parallel_tiled_decode(latents)), ValueError, "this tiled decode", *words)
    vae.config = replace(vae.config, memory_limit_gib=8.0)
    still_works(vae)
    return "fine"


def memory_limits_differ(here: Rank) -> str:
    """The least of the ranks' limits holds on all; one rank that changes its limit alone is told, not left waiting."""
    latents = noise(1, 16, 1, 32, 32, device=here.device)
    least = TILE_FITS_GIB if here.rank == here.size - 1 else 8.0
    vae = _vae(here, memory_limit_gib=least, **TILES)
    vae.decode(latents)
    assert vae.last_choice is not None
    assert vae.last_choice.mode == "tiled"
    if here.rank == 0:
        vae.config = replace(vae.config, memory_limit_gib=4.0)
    expect(error_of(lambda: vae.decode(latents)), RankError, "asked for different things", "memory budget")
    vae.config = replace(vae.config, memory_limit_gib=2.0)
    still_works(vae)
    return "fine"


def half_a_vae(here: Rank) -> str:
    """A VAE built without its decoder cannot decode and says so; likewise its encoder."""
    latents, pixels = noise(1, 16, 1, 4, 4, device=here.device), pictures(1, 3, 1, 32, 32, device=here.device)
    whole = small_vae(device=here.device)
    encoder, decoder = _vae(here, load_decoder=False), _vae(here, load_encoder=False)
    encoder.load_state_dict(whole.state_dict(), strict=False)
    decoder.load_state_dict(whole.state_dict(), strict=False)
    for decode in (encoder.decode, encoder.parallel_patch_decode, encoder.parallel_tiled_decode):
        expect(error_of(lambda d=decode: d(latents)), ValueError, "load_decoder=False", "cannot decode")
    expect(error_of(lambda: decoder.encode(pixels)), ValueError, "load_encoder=False", "cannot encode")
    assert max_error(decoder.decode(latents), whole.decode(latents)) <= 2e-5
    assert max_error(encoder.encode(pixels).mean, whole.encode(pixels).mean) <= 2e-5
    return "fine"


def _cases() -> dict[str, tuple[int, Case]]:
    """Name -> (fewest ranks it needs, the case)."""
    cases: dict[str, tuple[int, Case]] = {}
    for call, method, good_steps in (
        ("decode", "parallel_patch_decode", 0),
        ("decode", "parallel_patch_decode", 1),
        ("decode", "parallel_tiled_decode", 0),
        ("encode_window", "encode", 1),
        ("encode_features", "encode", 0),
    ):
        case = partial(one_rank_breaks, call=call, method=method, good_steps=good_steps)
        cases[f"fault-{method}-{call}-after-{good_steps}"] = (1, case)
    cases["fault-progress"] = (1, progress_raises)
    for where in ("engine", "caller"):
        cases[f"fault-stream-{where}"] = (1, partial(stream_breaks, where=where))
    for method in ("parallel_patch_decode", "parallel_tiled_decode", "decode"):
        cases[f"fault-nan-{method}"] = (1, partial(nan_on_one_rank, method=method))
    for about in ("shape", "output", "mode", "tiles"):
        cases[f"fault-ranks-disagree-{about}"] = (2, partial(ranks_disagree, about=about))
    cases["fault-output-type"] = (1, bad_output_type_on_one_rank)
    cases["fault-bad-input"] = (1, bad_input)
    cases["fault-memory-limit"] = (1, over_memory_limit)
    cases["fault-memory-limits-differ"] = (2, memory_limits_differ)
    cases["fault-half-a-vae"] = (1, half_a_vae)
    return cases


FAULT_CASES = _cases()
