"""CUDA C++ kernels for Hopper, compiled at run time by the NVRTC that PyTorch brings: no toolkit, no build step.

A kernel must have been compiled before a CUDA graph that uses it is captured.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent


def unfit(x: Tensor) -> str | None:
    """Why no such kernel can run on ``x``, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {x.dtype}"
    if not x.is_cuda or torch.version.hip or torch.cuda.get_device_capability(x.device) != (9, 0):
        return "the kernel is made for Hopper GPUs (compute capability 9.0)"
    if not hasattr(torch.cuda, "_compile_kernel"):
        return "this PyTorch cannot compile CUDA kernels (2.9 can)"
    return None


def fetchable(x: Tensor) -> Tensor:
    """``x``, or a copy where the copy engine cannot fetch its rows from where they are.

    Rows must be whole, and begin at multiples of 16 bytes. Kernels get strides in these units, as 32-bit integers.
    """
    unit = 16 // x.element_size()
    fits = all(0 < stride < unit * 2**31 and stride % unit == 0 for stride in x.stride()[:-1])
    if fits and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def source_of(name: str, defines: tuple[tuple[str, int], ...]) -> str:
    """What is compiled: the definitions, what the kernels share, and ``name``.cu."""
    texts = [(_FOLDER / file).read_text(encoding="utf-8") for file in ("hopper.cuh", f"{name}.cu")]
    return "".join([*(f"#define {key} {value}\n" for key, value in defines), *texts])


@cache
def compiled(
    name: str, defines: tuple[tuple[str, int], ...], shared_bytes: int, device: torch.device, file: str | None = None
) -> Any:
    """The kernel ``name`` of ``file``.cu, or of ``name``.cu, loaded on ``device``; it takes a grid, a block, arguments
    and ``shared_mem``. ``SHARED_BYTES`` is defined for it."""
    from torch.utils import cpp_extension

    source = source_of(file or name, (*defines, ("SHARED_BYTES", shared_bytes)))
    home = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = home or "/usr/local/cuda"  # PyTorch asks for the toolkit's headers: none is needed
    try:
        with torch.cuda.device(device):
            kernel = torch.cuda._compile_kernel(source, name, compute_capability="90a")
    finally:
        cpp_extension.CUDA_HOME = home
    kernel.set_shared_memory_config(shared_bytes)
    return kernel


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks of a kernel run at once, where each takes a multiprocessor's memory."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
