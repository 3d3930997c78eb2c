"""What a GPU does between the matrix products, a pass over the data each. Arithmetic is in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128
"""Of the tiles of elementwise kernels."""
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
