"""Attention with one wide head: all positions of a frame attend to all, head dim 384 in the published model.

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

from paravae.layers import hopper_attention
from paravae.layers.dispatch import FusedOp, jit, split_channels, tl, triton

_BLOCK_QUERIES, _BLOCK_KEYS, _WARPS, _STAGES = 64, 32, 4, 3  # the fastest of a sweep on an H200: 425 TFLOP/s
_MOST_CHANNELS = 384  # queries and three stages of keys and values in 227 KiB of shared memory


def _reference(qkv: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(C)) V, accumulated in fp32 or better: [N, tokens, 3 C] -> [N, tokens, C].

    ``qkv``: queries, keys and values of each token side by side.
    """
    query, key, value = qkv[:, None].chunk(3, dim=-1)
    return F.scaled_dot_product_attention(query.contiguous(), key.contiguous(), value.contiguous())[:, 0]


@jit
def wide_attention_kernel(
    query1,  # descriptors of qkv as [N tokens, 3 C], in blocks of queries ...
    query2,
    key1,  # ... and of keys and values; 1: the first D1 channels of the head, 2: the D2 after them
    key2,
    out_ptr,  # [N tokens, C]
    tokens,
    scale,  # 1 / sqrt(C), in powers of two
    C: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    image = tl.program_id(1) * tokens
    q1 = query1.load([image + first, 0])
    out1 = tl.zeros((BLOCK_M, D1), tl.float32)
    if D2:
        q2 = query2.load([image + first, D1])
        out2 = tl.zeros((BLOCK_M, D2), tl.float32)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    for n in tl.range(0, tokens, BLOCK_N):
        # All keys before the first product, all values before the second: the order costs a tenth otherwise.
        k1 = key1.load([image + n, C])
        if D2:
            k2 = key2.load([image + n, C + D1])
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
        v1 = key1.load([image + n, 2 * C])
        if D2:
            v2 = key2.load([image + n, 2 * C + D1])
        out1 = tl.dot(p, v1, out1 * rescale[:, None])
        if D2:
            out2 = tl.dot(p, v2, out2 * rescale[:, None])
    token = first + tl.arange(0, BLOCK_M)
    at = (image + token).to(tl.int64)[:, None] * C
    keep = (token < tokens)[:, None]
    share = 1.0 / weight[:, None]
    tl.store(out_ptr + at + tl.arange(0, D1)[None, :], (out1 * share).to(out_ptr.dtype.element_ty), mask=keep)
    if D2:
        at2 = at + D1 + tl.arange(0, D2)[None, :]
        tl.store(out_ptr + at2, (out2 * share).to(out_ptr.dtype.element_ty), mask=keep)


def _unfit_for_triton(qkv: Tensor) -> str | None:
    channels = qkv.shape[-1] // 3
    first, second = split_channels(channels)
    if first + second != channels or min(first, second or first) < 16 or channels > _MOST_CHANNELS:
        return f"the kernel takes a head of one or two powers of two from 16 to {_MOST_CHANNELS}, not {channels}"
    if qkv.dtype == torch.float32 and qkv.is_cuda:
        return "the kernel takes float16 and bfloat16"
    if qkv.is_cuda and torch.cuda.get_device_capability(qkv.device) < (9, 0):
        return "the kernel needs compute capability 9.0 (Hopper) or newer"
    if qkv.shape[0] * qkv.shape[1] >= 2**31:
        return f"{list(qkv.shape)} has too many tokens"
    return None


def _launch_triton(qkv: Tensor) -> Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    images, tokens, channels3 = qkv.shape
    channels = channels3 // 3
    first, second = split_channels(channels)
    flat = qkv.contiguous().view(images * tokens, channels3)

    def blocks(rows: int, channels: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(flat, [rows, channels or first])

    out = torch.empty((images, tokens, channels), dtype=qkv.dtype, device=qkv.device)
    wide_attention_kernel[(triton.cdiv(tokens, _BLOCK_QUERIES), images)](
        blocks(_BLOCK_QUERIES, first),
        blocks(_BLOCK_QUERIES, second),
        blocks(_BLOCK_KEYS, first),
        blocks(_BLOCK_KEYS, second),
        out,
        tokens,
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


def _unfit(qkv: Tensor) -> str | None:
    return hopper_attention.unfit(qkv) and by_triton._reason(qkv)


def _launch(qkv: Tensor) -> Tensor:
    if hopper_attention.unfit(qkv) is None:
        return by_cuda(qkv)  # or by Triton, if that fails
    return by_triton.kernel(qkv)


wide_attention = FusedOp("wide_attention", _reference, _launch, _unfit, triton=False)
