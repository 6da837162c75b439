"""What a device is called, and what it has, in bytes."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

GIB = 2**30


@lru_cache(maxsize=16)
def device_bytes(device: torch.device) -> int:
    """All the memory that ``device`` has; for a CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int:
    """The memory that ``device`` has to spare, PyTorch's own cache included; of a CPU's, all."""
    if device.type != "cuda":
        return device_bytes(device)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """A GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
