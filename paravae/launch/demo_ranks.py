"""What each rank of the demo does: the picture is encoded, decoded in every mode, timed and compared."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from paravae import AutoencoderKLQwenImage, RankError
from paravae.launch.errors import INPUT_STATUS, agreed, leave_at_once, status_of
from paravae.launch.latents import open_latents, read_latents, write_latents
from paravae.launch.picture_input import fit_to_model, read_picture
from paravae.launch.picture_output import plan_output, write_pictures
from paravae.launch.world import Place, World, world
from paravae.vae.pixels import from_uint8, psnr_db

Result = TypeVar("Result")

REPEATS = 3
LATENTS = "latents.safetensors"


@dataclass(frozen=True)
class Job:
    """What the demo's ranks are to do; ``scratch`` is an empty folder that they share."""

    model: str
    picture: Path
    output: Path
    ranks: int
    threads_a_rank: int
    scratch: Path

    @property
    def error_file(self) -> Path:
        return self.scratch / "error.json"

    @property
    def results_file(self) -> Path:
        return self.scratch / "results.json"


@dataclass(frozen=True)
class DecodeRow:
    """One way to decode: ``mode`` and ``grid`` say what ran; errors are between 8-bit pictures."""

    name: str
    mode: str
    ranks: int
    grid: tuple[int, int]
    seconds: float
    max_error: int
    """Largest difference from the one-rank decode, in levels of 255."""
    differing: float
    """Share of the values that differ from the one-rank decode at all."""
    psnr_to_one_rank: float | None
    """In dB; None if identical."""
    psnr_to_original: float
    file: str


@dataclass(frozen=True)
class Results:
    """All that the demo measured."""

    picture: str
    width: int
    height: int
    ranks: int
    threads_a_rank: int
    repeats: int
    encode_seconds: tuple[float, float]
    """On one rank, on all."""
    encode_max_error: float
    """Largest difference between the latents of one rank and those of all."""
    latents_peak: float
    """Largest magnitude of a latent."""
    latents_file: str
    decodes: tuple[DecodeRow, ...]

    @staticmethod
    def from_json(text: str) -> Results:
        stated = json.loads(text)
        return Results(**{**stated, "decodes": tuple(DecodeRow(**row) for row in stated["decodes"])})


def run_rank(rank: int, job: Job) -> None:
    """One rank of the demo, in a process of its own; rank 0 leaves the results in ``job.results_file``."""
    torch.set_num_threads(job.threads_a_rank)
    logging.getLogger("paravae").setLevel(logging.WARNING)
    store = dist.FileStore(str(job.scratch / "store"), job.ranks) if job.ranks > 1 else None
    place = Place(rank, job.ranks, rank, job.ranks, store)
    try:
        with world(place, "cpu") as here:
            results = _measure(job, here)
        if rank == 0:
            job.results_file.write_text(json.dumps(asdict(results)), encoding="utf-8")
    except Exception as error:
        if not isinstance(error, RankError):
            kind = "input" if status_of(error) == INPUT_STATUS else "failure"
            job.error_file.write_text(json.dumps([kind, str(error)]), encoding="utf-8")
        raise
    if job.ranks > 1:
        leave_at_once(0)


def _measure(job: Job, here: World) -> Results:
    with agreed(here.group, "prepare the demo"):
        vae = AutoencoderKLQwenImage.from_pretrained(job.model)
        arch = vae.config.arch_config
        original = read_picture(job.picture)
        original = fit_to_model(original, arch.spatial_ratio, arch.temporal_ratio, crop=True, name=str(job.picture))
    pixels = from_uint8(original)
    one_rank, one_seconds = _timed_on_one(here, lambda: vae.encode(pixels).mode())
    latents = _shared_latents(job, here, vae, one_rank, original)

    rows: list[DecodeRow] = []
    reference, seconds = _timed_on_one(here, lambda: vae.decode(latents, output_type="uint8"))
    if here.rank == 0:
        assert reference is not None
        rows.append(_row(job, "one rank", vae, reference, seconds, reference, original))
    vae.config = replace(vae.config, use_parallel_decode=True)
    many_ranks, many_seconds = _timed(here, lambda: vae.encode(pixels).mode())
    for mode in ("tiled", "patch", "auto"):
        vae.config = replace(vae.config, parallel_decode_mode=mode)
        levels, seconds = _timed(here, lambda: vae.decode(latents, output_type="uint8"))
        if here.rank == 0:
            assert reference is not None
            rows.append(_row(job, mode, vae, levels, seconds, reference, original))
    if here.rank == 0:
        write_pictures(plan_output(str(job.output / "original.png"), 1, 1, 1), original)
    return Results(
        picture=job.picture.name,
        width=original.shape[-1],
        height=original.shape[-2],
        ranks=here.size,
        threads_a_rank=job.threads_a_rank,
        repeats=REPEATS,
        encode_seconds=(one_seconds, many_seconds),
        encode_max_error=float((many_ranks - latents).abs().max()),
        latents_peak=float(latents.abs().max()),
        latents_file=LATENTS,
        decodes=tuple(rows),
    )


def _timed(here: World, work: Callable[[], Result]) -> tuple[Result, float]:
    """The result of ``work``, done on all ranks, and the median of its seconds after a warm-up."""
    result = work()
    seconds = []
    for _ in range(REPEATS):
        here.group.minimum("start together", 0)
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def _timed_on_one(here: World, work: Callable[[], Result]) -> tuple[Result | None, float]:
    """``_timed`` on rank 0, while the others wait; they get None."""
    with here.group.agreement("work of one rank"):
        if here.rank == 0:
            return _timed(World(0, 1, here.device, here.group.alone()), work)
    return None, 0.0


def _shared_latents(
    job: Job, here: World, vae: AutoencoderKLQwenImage, latents: Tensor | None, original: Tensor
) -> Tensor:
    """The latents that rank 0 has, written to the demo's folder and read from there by all."""
    path = job.output / LATENTS
    with here.group.agreement("write the latents"):
        if latents is not None:
            height, width = original.shape[-2:]
            write_latents(path, latents, normalized=False, frames=1, height=height, width=width)
    with agreed(here.group, "read the latents"):
        return read_latents(open_latents(path, normalized=None, height=None, width=None, max_gib=4), vae)
    raise AssertionError("an agreement never swallows an error")


def _row(
    job: Job,
    name: str,
    vae: AutoencoderKLQwenImage,
    levels: Tensor,
    seconds: float,
    reference: Tensor,
    original: Tensor,
) -> DecodeRow:
    """Write the picture and say how it compares."""
    file = name.replace(" ", "-") + ".png"
    write_pictures(plan_output(str(job.output / file), 1, 1, 1), levels)
    choice = vae.last_choice
    assert choice is not None
    difference = (levels.int() - reference.int()).abs()
    return DecodeRow(
        name=name,
        mode=choice.mode,
        ranks=choice.ranks,
        grid=choice.grid,
        seconds=seconds,
        max_error=int(difference.max()),
        differing=float((difference > 0).double().mean()),
        psnr_to_one_rank=psnr_db(levels, reference, 255) if difference.any() else None,
        psnr_to_original=psnr_db(levels, original, 255),
        file=file,
    )
