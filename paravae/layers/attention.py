"""Attention with one wide head: positions of a frame attend to all of it, head dim 384 in the published model.

Queries come apart from keys and values, so that a rank can attend for its part of them. On one GPU both are views of
one matrix product's result, which are read where they are: rows may be any multiple of 16 bytes apart.

The usual kernels stop at head dim 256, which leaves PyTorch with one that runs at a fifth of the GPU's rate. These
are flash attention (Dao et al. 2022: softmax rescaled as blocks of keys come by, so no score matrix). The one for
Hopper and head dim 384 is CUDA C++ (hopper_attention.py); the one for all else is Triton's, here, with the head dim cut
into two powers of two, 384 = 256 + 128, and keys and values fetched by the copy engine.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from paravae.layers import hopper, hopper_attention
from paravae.layers.dispatch import FusedOp, jit, split_channels, tl, triton

_BLOCK_QUERIES, _BLOCK_KEYS, _WARPS, _STAGES = 64, 32, 4, 3  # the fastest of a sweep on an H200: 425 TFLOP/s
_MOST_CHANNELS = 384  # queries and three stages of keys and values in 227 KiB of shared memory


def _reference(query: Tensor, keys_values: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(C)) V, accumulated in fp32 or better: [N, queries, C] -> [N, queries, C], contiguous.

    ``keys_values``: [N, tokens, 2 C], the key and then the value of each token side by side.
    """
    # A lone token counts as contiguous at any address, but PyTorch's kernels fail at odd ones: fetchable's copies help.
    parts = (query, *keys_values.chunk(2, dim=-1))
    query, key, value = (hopper.fetchable(part[:, None].contiguous()) for part in parts)
    return F.scaled_dot_product_attention(query, key, value)[:, 0].contiguous()


@jit
def wide_attention_kernel(
    query1,  # descriptors of the queries, [N queries, C] ...
    query2,
    key1,  # ... and of keys and values, [N tokens, 2 C]; 1: the first D1 channels of the head, 2: the D2 after them
    key2,
    out_ptr,  # [N queries, C]
    queries,
    tokens,
    scale,  # 1 / sqrt(C), in powers of two
    C: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    image_queries = tl.program_id(1) * queries  # where the image begins
    image = tl.program_id(1) * tokens
    q1 = query1.load([image_queries + first, 0])
    out1 = tl.zeros((BLOCK_M, D1), tl.float32)
    if D2:
        q2 = query2.load([image_queries + first, D1])
        out2 = tl.zeros((BLOCK_M, D2), tl.float32)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    for n in tl.range(0, tokens, BLOCK_N):
        # All keys before the first product, all values before the second: the order costs a tenth otherwise.
        k1 = key1.load([image + n, 0])
        if D2:
            k2 = key2.load([image + n, D1])
        scores = tl.dot(q1, k1.T)
        if D2:
            scores = tl.dot(q2, k2.T, scores)
        # Past the last token stand the next image's, or zeros: neither may count.
        scores = tl.where((n + tl.arange(0, BLOCK_N) < tokens)[None, :], scores * scale, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - new_largest[:, None])
        rescale = tl.exp2(largest - new_largest)
        weight = weight * rescale + tl.sum(p, 1)
        largest = new_largest
        p = p.to(q1.dtype)
        v1 = key1.load([image + n, C])
        if D2:
            v2 = key2.load([image + n, C + D1])
        out1 = tl.dot(p, v1, out1 * rescale[:, None])
        if D2:
            out2 = tl.dot(p, v2, out2 * rescale[:, None])
    query = first + tl.arange(0, BLOCK_M)
    at = (image_queries + query).to(tl.int64)[:, None] * C
    keep = (query < queries)[:, None]
    share = 1.0 / weight[:, None]
    tl.store(out_ptr + at + tl.arange(0, D1)[None, :], (out1 * share).to(out_ptr.dtype.element_ty), mask=keep)
    if D2:
        at2 = at + D1 + tl.arange(0, D2)[None, :]
        tl.store(out_ptr + at2, (out2 * share).to(out_ptr.dtype.element_ty), mask=keep)


def _unfit_for_triton(query: Tensor, keys_values: Tensor) -> str | None:
    images, queries, channels = query.shape
    first, second = split_channels(channels)
    if first + second != channels or min(first, second or first) < 16 or channels > _MOST_CHANNELS:
        return f"the kernel takes a head of one or two powers of two from 16 to {_MOST_CHANNELS}, not {channels}"
    if query.dtype == torch.float32 and query.is_cuda:
        return "the kernel takes float16 and bfloat16"
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (9, 0):
        return "the kernel needs compute capability 9.0 (Hopper) or newer"
    if images * max(queries, keys_values.shape[1]) >= 2**31:
        return f"{list(query.shape)} and {list(keys_values.shape)} have too many tokens"
    return None


def _launch_triton(query: Tensor, keys_values: Tensor) -> Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    images, queries, channels = query.shape
    first, second = split_channels(channels)

    def blocks(x: Tensor, rows: int) -> list[TensorDescriptor]:
        flat = hopper.fetchable(x.flatten(0, 1))  # a view, if all rows are equally far apart
        return [TensorDescriptor.from_tensor(flat, [rows, width]) for width in (first, second or first)]

    out = query.new_empty((images, queries, channels))
    wide_attention_kernel[(triton.cdiv(queries, _BLOCK_QUERIES), images)](
        *blocks(query, _BLOCK_QUERIES),
        *blocks(keys_values, _BLOCK_KEYS),
        out,
        queries,
        keys_values.shape[1],
        channels**-0.5 * math.log2(math.e),
        C=channels,
        D1=first,
        D2=second,
        BLOCK_M=_BLOCK_QUERIES,
        BLOCK_N=_BLOCK_KEYS,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return out


by_triton = FusedOp("wide_attention by Triton", _reference, _launch_triton, _unfit_for_triton)
by_cuda = FusedOp(
    "wide_attention by CUDA",
    by_triton,
    hopper_attention.launch,
    hopper_attention.unfit,
    triton=False,
    otherwise="Triton's kernel",
)


def _unfit(query: Tensor, keys_values: Tensor) -> str | None:
    return hopper_attention.unfit(query, keys_values) and by_triton._reason(query, keys_values)


def _launch(query: Tensor, keys_values: Tensor) -> Tensor:
    if hopper_attention.unfit(query, keys_values) is None:
        return by_cuda(query, keys_values)  # or by Triton, if that fails
    return by_triton.kernel(query, keys_values)


wide_attention = FusedOp("wide_attention", _reference, _launch, _unfit, triton=False)
