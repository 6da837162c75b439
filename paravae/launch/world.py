"""The ranks and devices of a command. Process groups are made and torn down here, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from paravae.launch.life import store_of_this_life
from paravae.vae.comm import RankGroup

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Place:
    """Where this process stands among those started together; ``store`` is where they leave each other notes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: dist.Store | None = None


@dataclass(frozen=True)
class World:
    """The ranks of a running command, from one of them: its device, and the group of all."""

    rank: int
    size: int
    device: torch.device
    group: RankGroup


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place:
    """What torchrun says in the environment; without it this process is alone.

    Raises:
        ValueError: the variables do not make sense together.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Place()
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is no number: {error}") from error
    if size == 1:
        return Place(local_rank=local_rank)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise ValueError(f"WORLD_SIZE is {size}, but {name} is not set; start the ranks with torchrun")
    store, rank, size = next(dist.rendezvous("env://", rank, size))
    return Place(rank, size, local_rank, local_size, store_of_this_life(store, rank, size))


@contextmanager
def world(place: Place, device: str = "auto") -> Iterator[World]:
    """The process group of all ranks, while the body runs. One rank alone needs none.

    Raises:
        ValueError: the device asked for is not there.
    """
    own = _device(device, place)
    if own.type == "cuda":
        torch.cuda.set_device(own)
        # float32 means float32: TF32 convolutions, PyTorch's default, would differ visibly from window to window.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if place.store is None:
        yield World(0, 1, own, RankGroup.alone())
        return
    cuda = own.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("world", place.store),
        rank=place.rank,
        world_size=place.size,
        device_id=own if cuda else None,
    )
    try:
        yield World(place.rank, place.size, own, RankGroup.world())
    except BaseException:
        if not cuda:  # NCCL's teardown could wait for a rank that is gone; the process ends soon anyway
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _device(device: str, place: Place) -> torch.device:
    if device not in DEVICES:
        raise ValueError(f"the device is {device!r}, needs one of {', '.join(DEVICES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
    gpus = torch.cuda.device_count()
    if place.local_size > gpus:
        raise ValueError(
            f"{place.local_size} ranks on this host, but it has {gpus} GPUs: each rank needs one of its own; "
            f"use torchrun --nproc-per-node {gpus}, or --device cpu"
        )
    return torch.device("cuda", place.local_rank)
