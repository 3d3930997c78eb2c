"""RoPE and attention of a local layer, forward and backward, in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Queries, and keys, of a tile."""


class LocalAttention(torch.autograd.Function):
    """RoPE and attention of a local layer, [T, heads, 3, d] -> [T, heads, d].

    A query sees keys of its own document at most `before` places to the left and `after` to the right. FlashAttention
    goes through tiles of 128 keys for windows of 65 or 129, and has a program for every tile of the longest document in
    each document. documents: [T], the document of each token.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, before: int, after: int
    ) -> Tensor:
        tokens, heads, _, dim = mixed.shape
        mixed = mixed.contiguous()
        context = mixed.new_empty(tokens, heads, dim)
        sums = torch.empty(heads, tokens, dtype=torch.float32, device=mixed.device)
        ctx.numbers = (tokens, heads, dim, before, after, BLOCK)
        ctx.grid = (triton.cdiv(tokens, BLOCK), heads)
        _local[ctx.grid](mixed, cos, sin, documents, context, sums, *ctx.numbers, num_stages=1)
        ctx.save_for_backward(mixed, cos, sin, documents, context, sums)
        return context

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        mixed, cos, sin, documents, context, sums = ctx.saved_tensors
        result = torch.empty_like(mixed)
        inputs = (mixed, cos, sin, documents, context, sums, grads[0].contiguous(), result)
        _local_backward[ctx.grid](*inputs, *ctx.numbers, num_stages=1)
        return result, None, None, None, None, None


@triton.jit
def _turned(source, cos, sin, place, angle, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of a tile of queries or keys after RoPE, in the dtype of the matrix products."""
    first = tl.load(source + place, inside, 0.0).to(tl.float32)
    second = tl.load(source + place + HALF, inside, 0.0).to(tl.float32)
    c = tl.load(cos + angle, inside, 0.0).to(tl.float32)
    s = tl.load(sin + angle, inside, 0.0).to(tl.float32)
    dtype = source.dtype.element_ty
    return (first * c - second * s).to(dtype), (second * c + first * s).to(dtype)


@triton.jit
def _store_turned_back(target, cos, sin, place, angle, inside, first, second, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    c = tl.load(cos + angle, inside, 0.0).to(tl.float32)
    s = tl.load(sin + angle, inside, 0.0).to(tl.float32)
    tl.store(target + place, first * c + second * s, inside)
    tl.store(target + place + HALF, second * c - first * s, inside)


@triton.jit
def _sees(document, row, documents, column, there, BEFORE: tl.constexpr, AFTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """[rows, columns]: of one document, and the column at most so many places before the row, or after it."""
    distance = row[:, None] - column[None, :]
    near = (distance <= BEFORE) & (distance >= -AFTER)
    return near & (document[:, None] == tl.load(documents + column, there, -2)[None, :])


@triton.jit
def _gradient_and_level(grad, context, place, inside):  # type: ignore[no-untyped-def]
    """A tile of the output's gradient, and its product with the output, by row."""
    above = tl.load(grad + place, inside, 0.0)
    return above, tl.sum(above.to(tl.float32) * tl.load(context + place, inside, 0.0).to(tl.float32), 1)


@triton.jit
def _local(  # type: ignore[no-untyped-def]
    mixed, cos, sin, documents, context, sums, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    SCALE: tl.constexpr = 1.4426950408889634 / DIM**0.5  # for powers of 2
    head = tl.program_id(1)
    half, whole = tl.arange(0, HALF)[None, :], tl.arange(0, DIM)[None, :]
    mixed += head * 3 * DIM
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, wide = row < tokens, row.to(tl.int64)[:, None]
    q1, q2 = _turned(mixed, cos, sin, wide * (3 * HEADS * DIM) + half, wide * DIM + half, inside[:, None], HALF)
    document = tl.load(documents + row, inside, -1)
    peak, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    output = tl.zeros([BLOCK, DIM], tl.float32)
    for start in range(-BEFORE, BLOCK + AFTER, BLOCK):
        column = tl.program_id(0) * BLOCK + start + tl.arange(0, BLOCK)
        there, long = (column >= 0) & (column < tokens), column.to(tl.int64)[:, None]
        place = long * (3 * HEADS * DIM)
        k1, k2 = _turned(mixed + DIM, cos, sin, place + half, long * DIM + half, there[:, None], HALF)
        value = tl.load(mixed + 2 * DIM + place + whole, there[:, None], 0.0)
        seen = _sees(document, row, documents, column, there, BEFORE, AFTER)
        logits = tl.dot(q2, tl.trans(k2), tl.dot(q1, tl.trans(k1))) * SCALE
        logits = tl.where(seen, logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, 1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen so far
        weights, shrink = tl.exp2(logits - finite[:, None]), tl.exp2(peak - finite)
        total = total * shrink + tl.sum(weights, 1)
        output = tl.dot(weights.to(value.dtype), value, output * shrink[:, None])
        peak = highest
    total = tl.where(inside, total, 1.0)
    tl.store(context + wide * (HEADS * DIM) + head * DIM + whole, output / total[:, None], inside[:, None])
    tl.store(sums + head * tokens + row, peak + tl.log2(total), inside)


@triton.jit
def _local_backward(  # type: ignore[no-untyped-def]
    mixed, cos, sin, documents, context, sums, grad, result, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program forms the gradients of its block's queries, and then those of its keys and values."""
    HALF: tl.constexpr = DIM // 2
    SCALE: tl.constexpr = 1.4426950408889634 / DIM**0.5
    head = tl.program_id(1)
    half, whole = tl.arange(0, HALF)[None, :], tl.arange(0, DIM)[None, :]
    mixed += head * 3 * DIM
    result += head * 3 * DIM
    context += head * DIM
    grad += head * DIM
    sums += head * tokens
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, wide = mine < tokens, mine.to(tl.int64)[:, None]
    place, angle, flat = wide * (3 * HEADS * DIM), wide * DIM + half, wide * (HEADS * DIM) + whole
    document = tl.load(documents + mine, inside, -1)

    q1, q2 = _turned(mixed, cos, sin, place + half, angle, inside[:, None], HALF)
    above, level = _gradient_and_level(grad, context, flat, inside[:, None])
    norm = tl.load(sums + mine, inside, 0.0)
    d1, d2 = tl.zeros([BLOCK, HALF], tl.float32), tl.zeros([BLOCK, HALF], tl.float32)
    for start in range(-BEFORE, BLOCK + AFTER, BLOCK):
        column = tl.program_id(0) * BLOCK + start + tl.arange(0, BLOCK)
        there, long = (column >= 0) & (column < tokens), column.to(tl.int64)[:, None]
        other = long * (3 * HEADS * DIM)
        k1, k2 = _turned(mixed + DIM, cos, sin, other + half, long * DIM + half, there[:, None], HALF)
        value = tl.load(mixed + 2 * DIM + other + whole, there[:, None], 0.0)
        seen = _sees(document, mine, documents, column, there, BEFORE, AFTER)
        logits = tl.dot(q2, tl.trans(k2), tl.dot(q1, tl.trans(k1))) * SCALE
        weights = tl.where(seen, tl.exp2(logits - norm[:, None]), 0.0)
        change = (weights * (tl.dot(above, tl.trans(value)) - level[:, None])).to(value.dtype)
        d1, d2 = tl.dot(change, k1, d1), tl.dot(change, k2, d2)
    scale: tl.constexpr = 1.0 / DIM**0.5
    _store_turned_back(result, cos, sin, place + half, angle, inside[:, None], d1 * scale, d2 * scale, HALF)

    k1, k2 = _turned(mixed + DIM, cos, sin, place + half, angle, inside[:, None], HALF)
    value = tl.load(mixed + 2 * DIM + place + whole, inside[:, None], 0.0)
    d1, d2 = tl.zeros([BLOCK, HALF], tl.float32), tl.zeros([BLOCK, HALF], tl.float32)
    d_value = tl.zeros([BLOCK, DIM], tl.float32)
    for start in range(-AFTER, BLOCK + BEFORE, BLOCK):
        column = tl.program_id(0) * BLOCK + start + tl.arange(0, BLOCK)  # of a query now
        there, long = (column >= 0) & (column < tokens), column.to(tl.int64)[:, None]
        q1, q2 = _turned(mixed, cos, sin, long * (3 * HEADS * DIM) + half, long * DIM + half, there[:, None], HALF)
        above, level = _gradient_and_level(grad, context, long * (HEADS * DIM) + whole, there[:, None])
        norm = tl.load(sums + column, there, 0.0)
        seen = _sees(document, mine, documents, column, there, AFTER, BEFORE)  # a key's view of the queries
        logits = tl.dot(k2, tl.trans(q2), tl.dot(k1, tl.trans(q1))) * SCALE
        weights = tl.where(seen, tl.exp2(logits - norm[None, :]), 0.0)
        d_value = tl.dot(weights.to(above.dtype), above, d_value)
        change = (weights * (tl.dot(value, tl.trans(above)) - level[None, :])).to(above.dtype)
        d1, d2 = tl.dot(change, q1, d1), tl.dot(change, q2, d2)
    _store_turned_back(result + DIM, cos, sin, place + half, angle, inside[:, None], d1 * scale, d2 * scale, HALF)
    tl.store(result + 2 * DIM + place + whole, d_value, inside[:, None])
