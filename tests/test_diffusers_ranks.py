"""Pipelines of diffusers on two ranks: all drive, or rank 0 does; and what happens when a rank does not do its part."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from paravae import QwenImageVAEConfig, RankError
from tests.builders import digest, max_error, noise, pictures
from tests.diffusers_cases import picture, pipeline, qwen_image, qwen_vae
from tests.ranks import Case, Rank, check, run_ranks

pytest.importorskip("accelerate", reason="needs paravae[diffusers]")

from paravae.integrations.driving import lead
from paravae.integrations.pipelines import accelerate, paravae_vae_for

ROOT = Path(__file__).parent.parent
SHARED = QwenImageVAEConfig(use_parallel_decode=True, parallel_decode_mode="patch")
PROMPT_S = 10.0


class Holder:
    def __init__(self, vae: Any) -> None:
        self.vae = vae


def _vae(config: QwenImageVAEConfig | None = SHARED, **options: Any) -> Any:
    return paravae_vae_for(Holder(qwen_vae()), config, **options)


def _error(kind: type[Exception], words: str, call: Callable[[], object]) -> Exception:
    """What ``call`` raises, promptly."""
    started = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        call()
    assert time.monotonic() - started < PROMPT_S, "the error came, but late"
    return caught.value


def _decodes_right(vae: Any) -> None:
    latents = noise(1, 16, 1, 8, 6, seed=3)
    assert max_error(vae.decode(latents).sample, _vae(None).decode(latents).sample) <= 2e-5


def all_drive(here: Rank) -> str:
    pipe = pipeline()
    before = picture(pipe)
    accelerated = accelerate(pipe, SHARED)
    made = picture(pipe)
    assert 0 < max_error(made, before) <= 2e-5
    assert accelerated.vae.paravae.last_choice.ranks == here.size
    accelerated.restore()
    assert torch.equal(picture(pipe), before)
    return digest(made)


def all_drive_an_edit(here: Rank) -> str:
    """Encodes are shared too."""
    pipe = pipeline("image to image")
    before = picture(pipe, "image to image")
    accelerate(pipe, SHARED)
    made = picture(pipe, "image to image")
    assert max_error(made, before) <= 2e-5
    return digest(made)


def other_seeds(here: Rank) -> str:
    """Ranks that drive alike but for the seed are told; so are those that ask for another size."""
    pipe = pipeline()
    accelerate(pipe, SHARED)
    words = "rank 1 came with something else than rank 0 .*give all ranks the same"
    _error(ValueError if here.rank else RankError, words, lambda: picture(pipe, seed=here.rank))
    vae = _vae()
    _error(RankError, "asked for different things", lambda: vae.decode(noise(1, 16, 1, 4, 4 + here.rank)))
    bad = [1.0] if here.rank else noise(1, 16, 1, 4, 4)
    _error(ValueError if here.rank else RankError, "latents are a list", lambda: vae.decode(bad))
    first = noise(1, 16, 1, 8, 8)
    nearly = vae.decode(first + 1e-3 * here.rank).sample  # as GPUs may round: rank 0's are decoded
    assert max_error(nearly, _vae(None).decode(first).sample) <= 2e-5
    _decodes_right(vae)
    return "fine"


def rank_zero_drives(here: Rank) -> str:
    """The others have a VAE and no pipeline; tiles that rank 0 turns on are theirs too."""
    if here.rank == 0:
        pipe = pipeline("image to image")
        before = picture(pipe, "image to image")
        vae = accelerate(pipe, SHARED).vae
    else:
        vae = _vae()

    def work() -> str:
        assert max_error(picture(pipe, "image to image"), before) <= 2e-5
        assert vae.paravae.last_choice.ranks == here.size
        latents = noise(2, 16, 1, 20, 16)
        vae.enable_tiling(64, 64, 48, 48)
        vae.enable_slicing()
        tiled = vae.decode(latents).sample
        assert vae.paravae.last_choice.mode == "tiled"
        assert max_error(tiled, torch.cat([vae.paravae.tiled_decode(part) for part in latents.split(1)])) <= 2e-5
        vae.disable_tiling()
        whole = vae.decode(latents).sample
        vae.enable_tiling(128, 128, 64, 64)
        vae.enable_tiling(64, 64, 48, 48)  # as it was for the others, who do not hear of it in between
        assert torch.equal(vae.decode(latents).sample, tiled)
        vae.enable_tiling(128, 128, 64, 64)
        vae.disable_tiling()
        assert torch.equal(vae.decode(latents).sample, whole)
        vae.encode(pictures(1, 3, 5, 16, 16))
        _error(ValueError, "is being led already", lambda: lead(vae, lambda: None))
        return "done"

    assert lead(vae, work) == ("done" if here.rank == 0 else None)
    assert vae.paravae.last_choice.ranks == here.size
    assert not vae.leads
    _decodes_right(vae)  # all drive again
    return "fine"


def rank_zero_fails(here: Rank, failure: BaseException) -> str:
    """Its error is its own, and ends the others' waiting; and all can go on."""
    vae = _vae()

    def work() -> None:
        vae.decode(noise(1, 16, 1, 8, 8))
        raise failure

    if here.rank:
        error = _error(RankError, f"rank 0 of {here.size} failed: .*{type(failure).__name__}", lambda: lead(vae, work))
        assert isinstance(error, RankError)
        assert error.rank == 0
        assert not error.gone
    else:
        with pytest.raises(type(failure), match="on purpose"):
            lead(vae, work)
    _decodes_right(vae)
    return "fine"


def errors_of_single_calls(here: Rank) -> str:
    """What rank 0 gets over ends nothing: its own bad input, and a rank that fails in the middle."""
    vae = _vae()
    if here.rank == 1:
        real, failures = vae.paravae.decode, [RuntimeError("broken on purpose")]

        def decode(*args: Any, **options: Any) -> Any:
            if failures:
                with vae.group.in_step("it breaks"):
                    raise failures.pop()
            return real(*args, **options)

        vae.paravae.decode = decode

    def work() -> str:
        latents = noise(1, 16, 1, 8, 8)
        _error(ValueError, "need \\[B, 16, T, h, w\\]", lambda: vae.decode(latents[0]))
        _error(RankError, "rank 1 of 2 failed: RuntimeError: broken on purpose", lambda: vae.decode(latents))
        _error(ValueError, "1024 NaN", lambda: vae.decode(latents * torch.nan))
        _decodes_right(vae)
        return "done"

    assert lead(vae, work) == ("done" if here.rank == 0 else None)
    return "fine"


def an_error_that_all_had_leaves_the_work(here: Rank) -> str:
    vae = _vae()
    latents = noise(1, 16, 1, 8, 8) * torch.nan
    kind = RankError if here.rank else ValueError
    _error(kind, "NaN", lambda: lead(vae, lambda: vae.decode(latents)))
    other = _vae()
    if here.rank:
        other.to(torch.float64)  # not what rank 0 has
    words = "rank 0 of 2 failed: RuntimeError: RankError: rank 1" if here.rank else "rank 1 of 2 failed: ValueError"
    _error(RankError, words, lambda: lead(other, lambda: other.decode(noise(1, 16, 1, 8, 8))))
    _decodes_right(vae)
    return "fine"


def a_vae_that_does_not_share(here: Rank) -> str:
    vae = _vae(QwenImageVAEConfig())
    _error(ValueError, "there are 2 ranks, but this VAE decodes alone", lambda: lead(vae, lambda: None))
    latents = noise(1, 16, 1, 4, 4, seed=here.rank)  # each its own: nothing is shared, or compared
    assert max_error(vae.decode(latents).sample, _vae(None).decode(latents).sample) == 0
    shared = _vae(None, group=dist.group.WORLD)
    _decodes_right(shared)
    assert shared.paravae.last_choice.ranks == here.size or shared.paravae.last_choice.mode == "single"
    return "fine"


def rank_zero_is_killed(here: Rank) -> str:
    vae = _vae()

    def work() -> None:
        vae.decode(noise(1, 16, 1, 8, 8))
        os._exit(3)

    error = _error(RankError, "rank 0 of 2 is gone", lambda: lead(vae, work))
    assert isinstance(error, RankError)
    assert error.gone
    return "fine"


def on_its_device(here: Rank) -> str:
    """Both ways of driving, with the weights where the rank computes."""
    vae, alone = _vae().to(here.device), _vae(None).to(here.device)
    latents, pixels = noise(1, 16, 1, 12, 9, device=here.device), pictures(1, 3, 1, 64, 48, device=here.device)
    wanted, moments = alone.decode(latents).sample, alone.encode(pixels).latent_dist.parameters

    def work() -> str:
        assert max_error(vae.decode(latents).sample, wanted) <= 2e-5
        assert max_error(vae.encode(pixels).latent_dist.parameters, moments) <= 2e-5
        return "done"

    assert work() == "done"
    for _ in range(2):
        assert lead(vae, work) == ("done" if here.rank == 0 else None)
    return "fine"


CASES: dict[str, Case] = {
    "on its device": on_its_device,
    "all drive": all_drive,
    "all drive an edit": all_drive_an_edit,
    "other seeds": other_seeds,
    "rank 0 drives": rank_zero_drives,
    "rank 0 fails": partial(rank_zero_fails, failure=KeyError("on purpose")),
    "rank 0 is interrupted": partial(rank_zero_fails, failure=KeyboardInterrupt("on purpose")),
    "errors of single calls": errors_of_single_calls,
    "an error that all had": an_error_that_all_had_leaves_the_work,
    "a VAE that does not share": a_vae_that_does_not_share,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(CASES, 2, tmp_path_factory.mktemp("ranks") / "rendezvous")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(outcomes: Any, name: str) -> None:
    check(outcomes, name)


def test_followers_notice_that_rank_zero_was_killed(tmp_path: Path) -> None:
    results = run_ranks({"killed": rank_zero_is_killed}, 2, tmp_path / "rendezvous", tidy=False)["killed"]
    assert results[1].value == "fine", results[1].error


@pytest.mark.nccl
def test_two_gpus(tmp_path: Path) -> None:
    cases = {"on its device": on_its_device}
    check(run_ranks(cases, 2, tmp_path / "rendezvous", backend="cpu:gloo,cuda:nccl"), "on its device")


@pytest.mark.parametrize("ranks", [1, 2])
def test_example(tmp_path: Path, ranks: int) -> None:
    """What it draws is what diffusers draws."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "examples/qwen_image.py"), "--output", "picture.png", "--size=64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert f"on {ranks} rank" in ended.stdout
    found = np.asarray(Image.open(tmp_path / "picture.png")).astype(int)
    wanted = qwen_image.generate(pipeline(), qwen_image.parser().parse_args(["--size=64"]))
    assert found.std() > 10, "a picture of one colour shows nothing"
    assert abs(found - np.asarray(wanted).astype(int)).max() <= 1
