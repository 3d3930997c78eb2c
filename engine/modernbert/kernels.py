"""What a GPU does between the matrix products: each is one pass over its data, in Triton. Arithmetic is in fp32.

A step of ModernBERT-base moves as much time in these as in its layers' matrix products; operation by operation it is
twice as much.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128
"""Of the tiles of elementwise kernels."""
BLOCK = 64
"""Queries, and keys, of a tile of local attention."""
SHARE = 64
"""Rows of which a program of the norm's backward pass adds up the weight's gradient."""


class GeGLU(torch.autograd.Function):
    """[..., 2 n] -> [..., n]: the exact GELU of the first half times the second."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        states = states.contiguous()
        ctx.save_for_backward(states)
        output = states.new_empty(*states.shape[:-1], states.shape[-1] // 2)
        _geglu[_tiles(output)](states, output, *_shape(output), ROWS, COLUMNS)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (states,) = ctx.saved_tensors
        grad, result = grads[0].contiguous(), torch.empty_like(states)
        _geglu_backward[_tiles(grad)](states, grad, result, *_shape(grad), ROWS, COLUMNS)
        return result


def _shape(states: Tensor) -> tuple[int, int]:
    width = states.shape[-1]
    return states.numel() // width, width


def _tiles(states: Tensor) -> tuple[int, int]:
    rows, width = _shape(states)
    return triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def _geglu(states, output, rows, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    place = row * (2 * width) + column
    first = tl.load(states + place, inside).to(tl.float32)
    second = tl.load(states + place + width, inside).to(tl.float32)
    result = 0.5 * first * (1.0 + tl.erf(first * 0.7071067811865476)) * second
    tl.store(output + row * width + column, result, inside)


@triton.jit
def _geglu_backward(states, grad, result, rows, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    place = row * (2 * width) + column
    first = tl.load(states + place, inside).to(tl.float32)
    second = tl.load(states + place + width, inside).to(tl.float32)
    grad_output = tl.load(grad + row * width + column, inside).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(first * 0.7071067811865476))  # the normal distribution up to `first`
    density = 0.3989422804014327 * tl.exp(-0.5 * first * first)
    tl.store(result + place, grad_output * second * (below + first * density), inside)
    tl.store(result + place + width, grad_output * first * below, inside)


class Rotate(torch.autograd.Function):
    """RoPE on query and key of [T, heads, 3, d] -> [T, heads, d] each; cos and sin are [T, d] of two equal halves."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, heads, _, dim = mixed.shape
        mixed = mixed.contiguous()
        query, key, value = (mixed.new_empty(tokens, heads, dim) for _ in range(3))
        grid = (triton.cdiv(tokens * heads, 4 * ROWS),)
        _rotate[grid](mixed, query, key, value, cos, sin, tokens * heads, heads, dim, 4 * ROWS, False)
        ctx.save_for_backward(cos, sin)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        query, key, value = (grad.contiguous() for grad in grads)
        tokens, heads, dim = query.shape
        mixed = query.new_empty(tokens, heads, 3, dim)
        grid = (triton.cdiv(tokens * heads, 4 * ROWS),)
        _rotate[grid](mixed, query, key, value, cos, sin, tokens * heads, heads, dim, 4 * ROWS, True)
        return mixed, None, None


@triton.jit
def _rotate(mixed, query, key, value, cos, sin, rows, heads, DIM: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    HALF: tl.constexpr = DIM // 2
    column = tl.arange(0, HALF)[None, :]
    inside = row < rows
    angle = (row // heads) * DIM + column
    c = tl.load(cos + angle, inside).to(tl.float32)
    s = tl.load(sin + angle, inside).to(tl.float32)
    together, apart = row * (3 * DIM) + column, row * DIM + column
    if BACK:
        s = -s
        _turn(query + apart, mixed + together, c, s, inside, HALF)
        _turn(key + apart, mixed + together + DIM, c, s, inside, HALF)
        _copy(value + apart, mixed + together + 2 * DIM, inside, HALF)
    else:
        _turn(mixed + together, query + apart, c, s, inside, HALF)
        _turn(mixed + together + DIM, key + apart, c, s, inside, HALF)
        _copy(mixed + together + 2 * DIM, value + apart, inside, HALF)


@triton.jit
def _turn(source, target, c, s, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.load(source, inside).to(tl.float32)
    second = tl.load(source + HALF, inside).to(tl.float32)
    tl.store(target, first * c - second * s, inside)
    tl.store(target + HALF, second * c + first * s, inside)


@triton.jit
def _copy(source, target, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(target, tl.load(source, inside), inside)
    tl.store(target + HALF, tl.load(source + HALF, inside), inside)


class AddAndNorm(torch.autograd.Function):
    """[..., h] plus another or None -> the sum, and its LayerNorm without a bias.

    The gradients of both are added where the norm's is formed.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, other: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        states, ctx.adds = states.contiguous(), other is not None
        rows, width = _shape(states)
        total = states if other is None else torch.empty_like(states)
        added = states if other is None else other.contiguous()
        normed = torch.empty_like(states)
        mean, inverse = torch.empty(2, rows, dtype=torch.float32, device=states.device)
        block = triton.next_power_of_2(width)
        _norm[(rows,)](
            states, added, total, weight, normed, mean, inverse, width, eps, ctx.adds, block, num_warps=_warps(block)
        )
        ctx.save_for_backward(total, weight, mean, inverse)
        return total.view_as(total), normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        states, weight, mean, inverse = ctx.saved_tensors
        kept, normed = (grad.contiguous() for grad in grads)
        rows, width = _shape(states)
        result, block = torch.empty_like(states), triton.next_power_of_2(width)
        programs = triton.cdiv(rows, SHARE)
        parts = torch.empty(programs, width, dtype=torch.float32, device=states.device)
        _norm_backward[(programs,)](
            states, weight, mean, inverse, kept, normed, result, parts, rows, width, SHARE, block,
            num_warps=_warps(block),
        )  # fmt: skip
        return result, result if ctx.adds else None, parts.sum(dim=0).to(weight.dtype), None


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    states, added, total, weight, normed, mean, inverse, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(states + row * width + column, inside, 0.0).to(tl.float32)
    if ADDS:
        x += tl.load(added + row * width + column, inside, 0.0).to(tl.float32)
        x = x.to(total.dtype.element_ty)  # the norm is of what the next layers see
        tl.store(total + row * width + column, x, inside)
        x = x.to(tl.float32)
    average = tl.sum(x, 0) / width
    centred = tl.where(inside, x - average, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    tl.store(normed + row * width + column, centred * scale * w, inside)
    tl.store(mean + row, average)
    tl.store(inverse + row, scale)


@triton.jit
def _norm_backward(  # type: ignore[no-untyped-def]
    states, weight, mean, inverse, kept, normed, result, parts, rows, width, SHARE: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    part = tl.zeros([BLOCK], tl.float32)
    for step in range(SHARE):
        row = tl.program_id(0).to(tl.int64) * SHARE + step
        place, there = row * width + column, inside & (row < rows)
        x = tl.load(states + place, there, 0.0).to(tl.float32)
        grad = tl.load(normed + place, there, 0.0).to(tl.float32)
        other = tl.load(kept + place, there, 0.0).to(tl.float32)
        scale = tl.load(inverse + row, row < rows, 0.0)
        unit = tl.where(there, (x - tl.load(mean + row, row < rows, 0.0)) * scale, 0.0)
        part += grad * unit
        weighted = grad * w
        along, level = tl.sum(weighted * unit, 0) / width, tl.sum(weighted, 0) / width
        tl.store(result + place, (weighted - unit * along - level) * scale + other, there)
    tl.store(parts + tl.program_id(0) * width + column, part, inside)


def exponentials_(logits: Tensor, peak: Tensor) -> Tensor:
    """As in `fused`."""
    sums = torch.empty_like(peak)
    _exponentials[(len(logits),)](logits, peak, sums, logits.stride(0), logits.shape[1], 4096, num_warps=8)
    return sums


@triton.jit
def _exponentials(logits, peak, sums, stride, width: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    top, total = tl.load(peak + row), tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = logits + row * stride + column
        power = tl.exp(tl.load(place, column < width, float("-inf")).to(tl.float32) - top)
        total += power
        tl.store(place, power, column < width)
    tl.store(sums + row, tl.sum(total, 0))


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
        seen = document[:, None] == tl.load(documents + column, there, -2)[None, :]
        distance = row[:, None] - column[None, :]
        seen &= (distance <= BEFORE) & (distance >= -AFTER)
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
    above = tl.load(grad + flat, inside[:, None], 0.0)
    level = tl.sum(above.to(tl.float32) * tl.load(context + flat, inside[:, None], 0.0).to(tl.float32), 1)
    norm = tl.load(sums + mine, inside, 0.0)
    d1, d2 = tl.zeros([BLOCK, HALF], tl.float32), tl.zeros([BLOCK, HALF], tl.float32)
    for start in range(-BEFORE, BLOCK + AFTER, BLOCK):
        column = tl.program_id(0) * BLOCK + start + tl.arange(0, BLOCK)
        there, long = (column >= 0) & (column < tokens), column.to(tl.int64)[:, None]
        other = long * (3 * HEADS * DIM)
        k1, k2 = _turned(mixed + DIM, cos, sin, other + half, long * DIM + half, there[:, None], HALF)
        value = tl.load(mixed + 2 * DIM + other + whole, there[:, None], 0.0)
        seen = document[:, None] == tl.load(documents + column, there, -2)[None, :]
        distance = mine[:, None] - column[None, :]
        seen &= (distance <= BEFORE) & (distance >= -AFTER)
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
        flat = long * (HEADS * DIM) + whole
        above = tl.load(grad + flat, there[:, None], 0.0)
        level = tl.sum(above.to(tl.float32) * tl.load(context + flat, there[:, None], 0.0).to(tl.float32), 1)
        norm = tl.load(sums + column, there, 0.0)
        seen = document[:, None] == tl.load(documents + column, there, -2)[None, :]
        distance = column[None, :] - mine[:, None]
        seen &= (distance <= BEFORE) & (distance >= -AFTER)
        logits = tl.dot(k2, tl.trans(q2), tl.dot(k1, tl.trans(q1))) * SCALE
        weights = tl.where(seen, tl.exp2(logits - norm[None, :]), 0.0)
        d_value = tl.dot(weights.to(above.dtype), above, d_value)
        change = (weights * (tl.dot(value, tl.trans(above)) - level[None, :])).to(above.dtype)
        d1, d2 = tl.dot(change, q1, d1), tl.dot(change, q2, d2)
    _store_turned_back(result + DIM, cos, sin, place + half, angle, inside[:, None], d1 * scale, d2 * scale, HALF)
    tl.store(result + 2 * DIM + place + whole, d_value, inside[:, None])
