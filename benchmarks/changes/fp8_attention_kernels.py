"""Local attention and RoPE in Triton with results in FP8, by rows and transposed, cast as `fp8_kernels` casts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.changes.fp8_kernels import TILE, Target, finish, largest, write
from engine.modernbert.kernels import attention


def rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, target: Target) -> None:
    """Turn dq and dk, [T, heads, d] BF16, back, and write them and dv, for [T, 1, heads * 3 * d], as E5M2."""
    tokens, heads, dim = dq.shape
    _rotate_backward[(triton.cdiv(tokens, TILE), heads)](dq, dk, dv, cos, sin, *target, tokens, heads, dim, TILE)


def local_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, reach: tuple[int, int], target: Target
) -> tuple[Tensor, Tensor]:
    """Write the output of a local layer, [T, heads, 3, d] BF16 -> [T, 1, heads * d], as E4M3.

    Args:
        qkv: Queries, keys and values before RoPE.
        cos: [T, d]
        sin: [T, d]
        documents: [T] int32, the document of each token.
        reach: Keys that a query sees to its left and to its right.
        target: For [T, 1, heads * d].

    Returns:
        The output [T, heads, d] BF16 and lse [heads, T] fp32, which the backward pass needs.
    """
    tokens, heads, _, dim = qkv.shape
    out = qkv.new_empty(tokens, heads, dim)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    _forward[(triton.cdiv(tokens, attention.BLOCK_M), heads)](
        qkv, cos, sin, documents, out, lse, *target, tokens, heads, dim, *reach, attention.BLOCK_M, attention.BLOCK_N,
        **attention.OPTIONS,
    )  # fmt: skip
    return out, lse


def local_attention_backward(
    qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    reach: tuple[int, int], target: Target,
) -> None:  # fmt: skip
    """Write the gradient of `qkv`, for [T, 1, heads * 3 * d], as E5M2, by that of the output, [T, 1, heads * d]."""
    tokens, heads, _, dim = qkv.shape
    _backward[(triton.cdiv(tokens, attention.BLOCK_M), heads)](
        qkv, cos, sin, documents, out, lse, grad, *target, tokens, heads, dim, *reach,
        attention.BLOCK_M, attention.BLOCK_N, **attention.OPTIONS,
    )  # fmt: skip


@triton.jit
def _write_columns(  # type: ignore[no-untyped-def]
    value,
    data,
    transposed,
    scale,
    m,
    mask,
    tokens,
    first,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Store a tile of the tokens m, [M, 1], in the columns from `first` on, and return its largest magnitude."""
    column = (first + tl.arange(0, SIZE)).to(tl.int64)[None, :]
    return largest(write(value, data, transposed, scale, m, column, tokens, WIDTH, mask, FORMAT))


@triton.jit
def _write_halves(  # type: ignore[no-untyped-def]
    left, right, data, transposed, scale, m, mask, tokens, first, WIDTH: tl.constexpr, HALF: tl.constexpr
):
    """Store both halves of dq or dk."""
    one = _write_columns(left, data, transposed, scale, m, mask, tokens, first, WIDTH, HALF, tl.float8e5)
    first += HALF
    other = _write_columns(right, data, transposed, scale, m, mask, tokens, first, WIDTH, HALF, tl.float8e5)
    return tl.maximum(one, other)


@triton.jit
def _rotate_backward(  # type: ignore[no-untyped-def]
    dq, dk, dv, cos, sin, data, transposed, scale_inverse, scale, amax, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    WIDTH: tl.constexpr = HEADS * 3 * DIM
    dtype = dq.dtype.element_ty
    head = tl.program_id(1)
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask, first, magnitude = m < tokens, head * 3 * DIM, 0.0
    place, half = (m * HEADS + head) * DIM, tl.arange(0, HALF)[None, :]
    for part in tl.static_range(2):
        source = dk if part else dq
        left = tl.load(source + place + half, mask, 0.0).to(tl.float32)
        right = tl.load(source + place + half + HALF, mask, 0.0).to(tl.float32)
        left, right = attention.turned_back(left, right, cos, sin, m * DIM + half, mask)
        left, right = left.to(dtype), right.to(dtype)
        written = _write_halves(left, right, data, transposed, scale, m, mask, tokens, first + part * DIM, WIDTH, HALF)
        magnitude = tl.maximum(magnitude, written)
    value = tl.load(dv + place + tl.arange(0, DIM)[None, :], mask, 0.0)
    first += 2 * DIM
    written = _write_columns(value, data, transposed, scale, m, mask, tokens, first, WIDTH, DIM, tl.float8e5)
    finish(tl.maximum(magnitude, written), scale_inverse, scale, amax)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv, cos, sin, documents, out, lse, data, transposed, scale_inverse, scale, amax, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    offs_m, mask_m, m = attention.tile(0, tokens, BLOCK_M, BLOCK_M)
    output, lse_m = attention.attend(qkv, cos, sin, documents, tokens, HEADS, DIM, BEFORE, AFTER, BLOCK_M, BLOCK_N)
    output, mask = output.to(out.dtype.element_ty), mask_m[:, None]
    tl.store(out + (m * HEADS + head) * DIM + tl.arange(0, DIM)[None, :], output, mask)
    tl.store(lse + head * tokens + offs_m, lse_m, mask_m)
    written = _write_columns(
        output, data, transposed, scale, m, mask, tokens, head * DIM, HEADS * DIM, DIM, tl.float8e4nv
    )
    finish(written, scale_inverse, scale, amax)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    qkv, cos, sin, documents, out, lse, grad, data, transposed, scale_inverse, scale, amax, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    WIDTH: tl.constexpr = HEADS * 3 * DIM
    dtype = qkv.dtype.element_ty
    first = tl.program_id(1) * 3 * DIM
    _, mask_m, m = attention.tile(0, tokens, BLOCK_M, BLOCK_M)
    mask = mask_m[:, None]
    dq1, dq2 = attention.query_gradients(
        qkv, cos, sin, documents, out, lse, grad, tokens, HEADS, DIM, BEFORE, AFTER, BLOCK_M, BLOCK_N
    )
    dq1, dq2 = dq1.to(dtype), dq2.to(dtype)
    of_queries = _write_halves(dq1, dq2, data, transposed, scale, m, mask, tokens, first, WIDTH, HALF)
    dk1, dk2, dv = attention.key_and_value_gradients(
        qkv, cos, sin, documents, out, lse, grad, tokens, HEADS, DIM, BEFORE, AFTER, BLOCK_M, BLOCK_N
    )
    first += DIM
    dk1, dk2 = dk1.to(dtype), dk2.to(dtype)
    of_keys = _write_halves(dk1, dk2, data, transposed, scale, m, mask, tokens, first, WIDTH, HALF)
    first += DIM
    dv = dv.to(dtype)
    of_values = _write_columns(dv, data, transposed, scale, m, mask, tokens, first, WIDTH, DIM, tl.float8e5)
    finish(tl.maximum(of_queries, tl.maximum(of_keys, of_values)), scale_inverse, scale, amax)
