"""RoPE and attention of a local layer in Triton, in the letters of FlashAttention-2 (arXiv 2307.08691).

For a query i and the keys j that it sees, with scale = 1 / sqrt(d):

    s_ij = scale * q_i . k_j        lse_i = log2 sum_j 2^(s_ij log2 e)        p_ij = 2^(s_ij log2 e - lse_i)
    o_i = sum_j p_ij v_j

and backward, with delta_i = do_i . o_i:

    dv_j = sum_i p_ij do_i          ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale * sum_j ds_ij k_j  dk_j = scale * sum_i ds_ij q_i

q and k are turned by RoPE when they are loaded, dq and dk are turned back when they are stored. RoPE pairs element e
with e + d/2, so a tile of q or k is two halves, q1 and q2, and q . k is q1 . k1 + q2 . k2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, OPTIONS = 64, 64, {"num_stages": 1, "num_warps": 4}
"""Tokens of a program, tokens per tile of those that they attend to, and Triton's options of a launch.

`benchmarks.gpu changes` measures others, each for another guess why the kernels reach 40 % of an H100's bandwidth: 128
tokens load and turn fewer keys per query, and 32 keys with 8 warps keep twice as many loads in flight.
"""


class LocalAttention(torch.autograd.Function):
    """RoPE and attention of a local layer, [T, heads, 3, d] -> [T, heads, d].

    A query sees the keys of its own document at most `before` places to the left and `after` to the right.
    FlashAttention itself visits tiles of 128 keys for windows of 65 or 129, and starts a program per tile of the
    longest document in each document. `documents` is [T] int32, the document of each token; cos and sin are [T, d].
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, before: int, after: int) -> Tensor:
        """Compute the output; lse [heads, T] fp32 is kept for the gradient."""
        tokens, heads, _, dim = qkv.shape
        qkv = qkv.contiguous()
        out = qkv.new_empty(tokens, heads, dim)
        lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
        ctx.sizes = (tokens, heads, dim, before, after, BLOCK_M, BLOCK_N)
        ctx.grid, ctx.options = (triton.cdiv(tokens, BLOCK_M), heads), OPTIONS
        _forward[ctx.grid](qkv, cos, sin, documents, out, lse, *ctx.sizes, **ctx.options)
        ctx.save_for_backward(qkv, cos, sin, documents, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Compute the gradient of qkv."""
        qkv, cos, sin, documents, out, lse = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        tensors = (qkv, cos, sin, documents, out, lse, grads[0].contiguous(), dqkv)
        _backward[ctx.grid](*tensors, *ctx.sizes, **ctx.options)
        return dqkv, None, None, None, None, None


@triton.jit
def _load_turned(source, cos, sin, offs, offs_angle, mask, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load both halves of a tile of q or k and turn them by RoPE, in the dtype of the matrix products."""
    x1 = tl.load(source + offs, mask, 0.0).to(tl.float32)
    x2 = tl.load(source + offs + HALF, mask, 0.0).to(tl.float32)
    c = tl.load(cos + offs_angle, mask, 0.0).to(tl.float32)
    s = tl.load(sin + offs_angle, mask, 0.0).to(tl.float32)
    dtype = source.dtype.element_ty
    return (x1 * c - x2 * s).to(dtype), (x2 * c + x1 * s).to(dtype)


@triton.jit
def turned_back(d1, d2, cos, sin, offs_angle, mask):  # type: ignore[no-untyped-def]
    """Turn both halves of a tile of dq or dk back."""
    c = tl.load(cos + offs_angle, mask, 0.0).to(tl.float32)
    s = tl.load(sin + offs_angle, mask, 0.0).to(tl.float32)
    return d1 * c + d2 * s, d2 * c - d1 * s


@triton.jit
def tile(start, tokens, BLOCK_M: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens of a tile that starts `start` places after the program's first token.

    These are their numbers, whether they exist, and the numbers as an int64 column for pointers.
    """
    offs = tl.program_id(0) * BLOCK_M + start + tl.arange(0, SIZE)
    return offs, (offs >= 0) & (offs < tokens), offs.to(tl.int64)[:, None]


@triton.jit
def _load_keys_and_values(qkv, cos, sin, n, mask_n, offs_half, offs_d, HEADS: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load k, turned by RoPE and in two halves, and v of the tokens n."""
    row_n = n * (3 * HEADS * DIM)
    k1, k2 = _load_turned(qkv + DIM, cos, sin, row_n + offs_half, n * DIM + offs_half, mask_n[:, None], DIM // 2)
    return k1, k2, tl.load(qkv + 2 * DIM + row_n + offs_d, mask_n[:, None], 0.0)


@triton.jit
def _visible(document_m, offs_m, documents, offs_n, mask_n, BEFORE: tl.constexpr, AFTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """[M, N]: both tokens are of one document, and n lies at most BEFORE places before m or AFTER places after it."""
    distance = offs_m[:, None] - offs_n[None, :]
    near = (distance <= BEFORE) & (distance >= -AFTER)
    return near & (document_m[:, None] == tl.load(documents + offs_n, mask_n, -2)[None, :])


@triton.jit
def _load_do_and_delta(grad, out, offs, mask):  # type: ignore[no-untyped-def]
    """Load a tile of do, and compute its delta, row by row."""
    do = tl.load(grad + offs, mask, 0.0)
    return do, tl.sum(do.to(tl.float32) * tl.load(out + offs, mask, 0.0).to(tl.float32), 1)


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    qkv, cos, sin, documents, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the output of the program's queries of one head, [BLOCK_M, d] fp32, and their lse, [BLOCK_M] fp32."""
    HALF: tl.constexpr = DIM // 2
    SCALE: tl.constexpr = 1.4426950408889634 / DIM**0.5  # log2(e) / sqrt(d)
    offs_half, offs_d = tl.arange(0, HALF)[None, :], tl.arange(0, DIM)[None, :]
    qkv += tl.program_id(1) * 3 * DIM
    offs_m, mask_m, m = tile(0, tokens, BLOCK_M, BLOCK_M)
    q1, q2 = _load_turned(qkv, cos, sin, m * (3 * HEADS * DIM) + offs_half, m * DIM + offs_half, mask_m[:, None], HALF)
    document_m = tl.load(documents + offs_m, mask_m, -1)
    m_i, l_i = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(-BEFORE, BLOCK_M + AFTER, BLOCK_N):
        offs_n, mask_n, n = tile(start, tokens, BLOCK_M, BLOCK_N)
        k1, k2, v = _load_keys_and_values(qkv, cos, sin, n, mask_n, offs_half, offs_d, HEADS, DIM)
        mask = _visible(document_m, offs_m, documents, offs_n, mask_n, BEFORE, AFTER)
        qk = tl.dot(q2, tl.trans(k2), tl.dot(q1, tl.trans(k1))) * SCALE
        qk = tl.where(mask, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # where no key was visible so far
        p, alpha = tl.exp2(qk - shift[:, None]), tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    l_i = tl.where(mask_m, l_i, 1.0)
    return acc / l_i[:, None], m_i + tl.log2(l_i)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv, cos, sin, documents, out, lse, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute and store the output and lse of one tile of queries of one head."""
    offs_m, mask_m, m = tile(0, tokens, BLOCK_M, BLOCK_M)
    head = tl.program_id(1)
    output, lse_m = attend(qkv, cos, sin, documents, tokens, HEADS, DIM, BEFORE, AFTER, BLOCK_M, BLOCK_N)
    tl.store(out + (m * HEADS + head) * DIM + tl.arange(0, DIM)[None, :], output, mask_m[:, None])
    tl.store(lse + head * tokens + offs_m, lse_m, mask_m)


@triton.jit
def query_gradients(  # type: ignore[no-untyped-def]
    qkv, cos, sin, documents, out, lse, grad, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dq of the program's tokens of one head in two halves, [BLOCK_M, d / 2] fp32 each."""
    HALF: tl.constexpr = DIM // 2
    SCALE: tl.constexpr = 1.4426950408889634 / DIM**0.5
    head = tl.program_id(1)
    offs_half, offs_d = tl.arange(0, HALF)[None, :], tl.arange(0, DIM)[None, :]
    qkv += head * 3 * DIM
    offs_m, mask_m, m = tile(0, tokens, BLOCK_M, BLOCK_M)
    angle_m = m * DIM + offs_half
    document_m = tl.load(documents + offs_m, mask_m, -1)
    q1, q2 = _load_turned(qkv, cos, sin, m * (3 * HEADS * DIM) + offs_half, angle_m, mask_m[:, None], HALF)
    do, delta = _load_do_and_delta(grad, out, (m * HEADS + head) * DIM + offs_d, mask_m[:, None])
    lse_m = tl.load(lse + head * tokens + offs_m, mask_m, 0.0)
    dq1, dq2 = tl.zeros([BLOCK_M, HALF], tl.float32), tl.zeros([BLOCK_M, HALF], tl.float32)
    for start in range(-BEFORE, BLOCK_M + AFTER, BLOCK_N):
        offs_n, mask_n, n = tile(start, tokens, BLOCK_M, BLOCK_N)
        k1, k2, v = _load_keys_and_values(qkv, cos, sin, n, mask_n, offs_half, offs_d, HEADS, DIM)
        mask = _visible(document_m, offs_m, documents, offs_n, mask_n, BEFORE, AFTER)
        qk = tl.dot(q2, tl.trans(k2), tl.dot(q1, tl.trans(k1))) * SCALE
        p = tl.where(mask, tl.exp2(qk - lse_m[:, None]), 0.0)
        ds = (p * (tl.dot(do, tl.trans(v)) - delta[:, None])).to(v.dtype)
        dq1, dq2 = tl.dot(ds, k1, dq1), tl.dot(ds, k2, dq2)
    scale: tl.constexpr = 1.0 / DIM**0.5
    return turned_back(dq1 * scale, dq2 * scale, cos, sin, angle_m, mask_m[:, None])


@triton.jit
def key_and_value_gradients(  # type: ignore[no-untyped-def]
    qkv, cos, sin, documents, out, lse, grad, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dk in two halves and dv, [BLOCK_M, d] fp32, of the program's tokens of one head.

    The tokens m are keys here, and n queries: a key sees queries BEFORE and AFTER the other way round.
    """
    HALF: tl.constexpr = DIM // 2
    SCALE: tl.constexpr = 1.4426950408889634 / DIM**0.5
    head = tl.program_id(1)
    offs_half, offs_d = tl.arange(0, HALF)[None, :], tl.arange(0, DIM)[None, :]
    qkv += head * 3 * DIM
    offs_m, mask_m, m = tile(0, tokens, BLOCK_M, BLOCK_M)
    document_m = tl.load(documents + offs_m, mask_m, -1)
    k1, k2, v = _load_keys_and_values(qkv, cos, sin, m, mask_m, offs_half, offs_d, HEADS, DIM)
    dk1, dk2 = tl.zeros([BLOCK_M, HALF], tl.float32), tl.zeros([BLOCK_M, HALF], tl.float32)
    dv = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(-AFTER, BLOCK_M + BEFORE, BLOCK_N):
        offs_n, mask_n, n = tile(start, tokens, BLOCK_M, BLOCK_N)
        row_n = n * (3 * HEADS * DIM)
        q1_n, q2_n = _load_turned(qkv, cos, sin, row_n + offs_half, n * DIM + offs_half, mask_n[:, None], HALF)
        do_n, delta_n = _load_do_and_delta(grad, out, (n * HEADS + head) * DIM + offs_d, mask_n[:, None])
        lse_n = tl.load(lse + head * tokens + offs_n, mask_n, 0.0)
        mask = _visible(document_m, offs_m, documents, offs_n, mask_n, AFTER, BEFORE)
        qk = tl.dot(k2, tl.trans(q2_n), tl.dot(k1, tl.trans(q1_n))) * SCALE
        p = tl.where(mask, tl.exp2(qk - lse_n[None, :]), 0.0)
        dv = tl.dot(p.to(do_n.dtype), do_n, dv)
        ds = (p * (tl.dot(v, tl.trans(do_n)) - delta_n[None, :])).to(do_n.dtype)
        dk1, dk2 = tl.dot(ds, q1_n, dk1), tl.dot(ds, q2_n, dk2)
    scale: tl.constexpr = 1.0 / DIM**0.5
    dk1, dk2 = turned_back(dk1 * scale, dk2 * scale, cos, sin, m * DIM + offs_half, mask_m[:, None])
    return dk1, dk2, dv


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    qkv, cos, sin, documents, out, lse, grad, dqkv, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dq of one tile of tokens of one head, and then dk and dv of the same tokens."""
    HALF: tl.constexpr = DIM // 2
    _, mask_m, m = tile(0, tokens, BLOCK_M, BLOCK_M)
    mask_m, row = mask_m[:, None], dqkv + (m * HEADS + tl.program_id(1)) * (3 * DIM)
    half = row + tl.arange(0, HALF)[None, :]
    dq1, dq2 = query_gradients(
        qkv, cos, sin, documents, out, lse, grad, tokens, HEADS, DIM, BEFORE, AFTER, BLOCK_M, BLOCK_N
    )
    tl.store(half, dq1, mask_m)
    tl.store(half + HALF, dq2, mask_m)
    dk1, dk2, dv = key_and_value_gradients(
        qkv, cos, sin, documents, out, lse, grad, tokens, HEADS, DIM, BEFORE, AFTER, BLOCK_M, BLOCK_N
    )
    tl.store(half + DIM, dk1, mask_m)
    tl.store(half + DIM + HALF, dk2, mask_m)
    tl.store(row + 2 * DIM + tl.arange(0, DIM)[None, :], dv, mask_m)
