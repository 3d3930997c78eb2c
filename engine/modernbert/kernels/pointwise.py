"""Operations between the matrix products in Triton, one pass over the data each. Arithmetic is in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128
"""Size of a tile of the elementwise kernels."""
ROWS_PER_PROGRAM = 64
"""Rows whose share of the weight's gradient one program of the norm's backward pass adds up."""


class GeGLU(torch.autograd.Function):
    """The exact GELU of the first half times the second half, [..., 2 n] -> [..., n]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        """Compute the gated states."""
        states = states.contiguous()
        ctx.save_for_backward(states)
        output = states.new_empty(*states.shape[:-1], states.shape[-1] // 2)
        _geglu[_tiles(output)](states, output, *_shape(output), ROWS, COLUMNS)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Compute the gradient of both halves."""
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
def gate(first, second):  # type: ignore[no-untyped-def]
    """Compute the exact GELU of `first` times `second`, fp32."""
    return 0.5 * first * (1.0 + tl.erf(first * 0.7071067811865476)) * second


@triton.jit
def gate_gradients(first, second, grad):  # type: ignore[no-untyped-def]
    """Compute the gradients of both factors of `gate`, fp32."""
    below = 0.5 * (1.0 + tl.erf(first * 0.7071067811865476))  # the normal distribution function
    density = 0.3989422804014327 * tl.exp(-0.5 * first * first)
    return grad * second * (below + first * density), grad * first * below


@triton.jit
def _geglu(states, output, rows, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, mask = _tile(rows, width, ROWS, COLUMNS)
    offs = row * (2 * width) + column
    first = tl.load(states + offs, mask).to(tl.float32)
    second = tl.load(states + offs + width, mask).to(tl.float32)
    tl.store(output + row * width + column, gate(first, second), mask)


@triton.jit
def _geglu_backward(states, grad, result, rows, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, mask = _tile(rows, width, ROWS, COLUMNS)
    offs = row * (2 * width) + column
    first = tl.load(states + offs, mask).to(tl.float32)
    second = tl.load(states + offs + width, mask).to(tl.float32)
    grad_output = tl.load(grad + row * width + column, mask).to(tl.float32)
    grad_first, grad_second = gate_gradients(first, second, grad_output)
    tl.store(result + offs, grad_first, mask)
    tl.store(result + offs + width, grad_second, mask)


class Rotate(torch.autograd.Function):
    """RoPE on q and k, [T, heads, 3, d] -> q, k, v of [T, heads, d]; cos and sin are [T, d] of two equal halves."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split and rotate."""
        tokens, heads, _, dim = qkv.shape
        qkv = qkv.contiguous()
        q, k, v = (qkv.new_empty(tokens, heads, dim) for _ in range(3))
        grid = (triton.cdiv(tokens * heads, 4 * ROWS),)
        _rotate[grid](qkv, q, k, v, cos, sin, tokens * heads, heads, dim, 4 * ROWS, False)
        ctx.save_for_backward(cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Rotate the gradients back and join them."""
        cos, sin = ctx.saved_tensors
        dq, dk, dv = (grad.contiguous() for grad in grads)
        tokens, heads, dim = dq.shape
        dqkv = dq.new_empty(tokens, heads, 3, dim)
        grid = (triton.cdiv(tokens * heads, 4 * ROWS),)
        _rotate[grid](dqkv, dq, dk, dv, cos, sin, tokens * heads, heads, dim, 4 * ROWS, True)
        return dqkv, None, None


@triton.jit
def _rotate(qkv, q, k, v, cos, sin, rows, heads, DIM: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    HALF: tl.constexpr = DIM // 2
    column = tl.arange(0, HALF)[None, :]
    mask = row < rows
    angle = (row // heads) * DIM + column
    c = tl.load(cos + angle, mask).to(tl.float32)
    s = tl.load(sin + angle, mask).to(tl.float32)
    joint, separate = row * (3 * DIM) + column, row * DIM + column
    if BACK:
        s = -s
        _turn(q + separate, qkv + joint, c, s, mask, HALF)
        _turn(k + separate, qkv + joint + DIM, c, s, mask, HALF)
        _copy(v + separate, qkv + joint + 2 * DIM, mask, HALF)
    else:
        _turn(qkv + joint, q + separate, c, s, mask, HALF)
        _turn(qkv + joint + DIM, k + separate, c, s, mask, HALF)
        _copy(qkv + joint + 2 * DIM, v + separate, mask, HALF)


@triton.jit
def _turn(source, target, c, s, mask, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.load(source, mask).to(tl.float32)
    second = tl.load(source + HALF, mask).to(tl.float32)
    tl.store(target, first * c - second * s, mask)
    tl.store(target + HALF, second * c + first * s, mask)


@triton.jit
def _copy(source, target, mask, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(target, tl.load(source, mask), mask)
    tl.store(target + HALF, tl.load(source + HALF, mask), mask)


class AddAndNorm(torch.autograd.Function):
    """The sum of two [..., h] (the second may be None), and its LayerNorm without a bias.

    The norm's backward pass also adds the gradient of the sum.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, other: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Compute the sum and its norm."""
        states, ctx.adds = states.contiguous(), other is not None
        rows, width = _shape(states)
        total = states if other is None else torch.empty_like(states)
        added = states if other is None else other.contiguous()
        normed = torch.empty_like(states)
        mean, inverse = torch.empty(2, rows, dtype=torch.float32, device=states.device)
        block = triton.next_power_of_2(width)
        _norm[(rows,)](
            states, added, total, weight, normed, mean, inverse, width, eps, ctx.adds, block, num_warps=warps(block)
        )
        ctx.save_for_backward(total, weight, mean, inverse)
        return total.view_as(total), normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        """Compute the gradients of the summands and of the weight."""
        states, weight, mean, inverse = ctx.saved_tensors
        kept, normed = (grad.contiguous() for grad in grads)
        rows, width = _shape(states)
        result, block = torch.empty_like(states), triton.next_power_of_2(width)
        programs = triton.cdiv(rows, ROWS_PER_PROGRAM)
        parts = torch.empty(programs, width, dtype=torch.float32, device=states.device)
        norm_backward[(programs,)](
            states, weight, mean, inverse, kept, normed, result, parts, rows, width, ROWS_PER_PROGRAM, block,
            num_warps=warps(block),
        )  # fmt: skip
        return result, result if ctx.adds else None, parts.sum(dim=0).to(weight.dtype), None


def warps(block: int) -> int:
    """Choose the warps of a program that takes rows of `block` columns."""
    return min(8, max(1, block // 256))


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    states, added, total, weight, normed, mean, inverse, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(states + row * width + column, mask, 0.0).to(tl.float32)
    if ADDS:
        x += tl.load(added + row * width + column, mask, 0.0).to(tl.float32)
        x = x.to(total.dtype.element_ty)  # the norm sees the rounded sum, as the next layers do
        tl.store(total + row * width + column, x, mask)
        x = x.to(tl.float32)
    average = tl.sum(x, 0) / width
    centred = tl.where(mask, x - average, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + column, mask, 0.0).to(tl.float32)
    tl.store(normed + row * width + column, centred * scale * w, mask)
    tl.store(mean + row, average)
    tl.store(inverse + row, scale)


@triton.jit
def norm_backward(  # type: ignore[no-untyped-def]
    states, weight, mean, inverse, kept, normed, result, parts, rows, width,
    ROWS_PER_PROGRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the sum, and the program's share of the weight's gradient."""
    column = tl.arange(0, BLOCK)
    mask = column < width
    w = tl.load(weight + column, mask, 0.0).to(tl.float32)
    part = tl.zeros([BLOCK], tl.float32)
    for step in range(ROWS_PER_PROGRAM):
        row = tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + step
        offs, mask_row = row * width + column, mask & (row < rows)
        x = tl.load(states + offs, mask_row, 0.0).to(tl.float32)
        grad = tl.load(normed + offs, mask_row, 0.0).to(tl.float32)
        other = tl.load(kept + offs, mask_row, 0.0).to(tl.float32)
        scale = tl.load(inverse + row, row < rows, 0.0)
        unit = tl.where(mask_row, (x - tl.load(mean + row, row < rows, 0.0)) * scale, 0.0)
        part += grad * unit
        weighted = grad * w
        along, level = tl.sum(weighted * unit, 0) / width, tl.sum(weighted, 0) / width
        tl.store(result + offs, (weighted - unit * along - level) * scale + other, mask_row)
    tl.store(parts + tl.program_id(0) * width + column, part, mask)


class Drop(torch.autograd.Function):
    """Dropout by a hash, [T, 1, n] -> [T, 1, n]; the arguments are those of `ops.drop`.

    `threshold` is the uint32 below which a hash drops its element, and `scale` multiplies the others.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, keys: Tensor, site: int, first_channel: int, threshold: int, scale: float
    ) -> Tensor:
        """Drop elements."""
        ctx.save_for_backward(keys)
        ctx.place = (site, first_channel, threshold, scale)
        return _dropped(states, keys, *ctx.place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Drop the same elements of the gradient."""
        (keys,) = ctx.saved_tensors
        return _dropped(grads[0], keys, *ctx.place), None, None, None, None, None


def _dropped(states: Tensor, keys: Tensor, site: int, first_channel: int, threshold: int, scale: float) -> Tensor:
    states = states.contiguous()
    output = torch.empty_like(states)
    place = (site, first_channel, threshold)
    _drop[_tiles(output)](states, keys, output, *_shape(output), *place, scale, ROWS, COLUMNS)
    return output


@triton.jit(do_not_specialize=["site", "first_channel", "threshold"])
def _drop(  # type: ignore[no-untyped-def]
    states, keys, output, rows, width: tl.constexpr, site, first_channel, threshold, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, mask = _tile(rows, width, ROWS, COLUMNS)
    token = _mix(tl.load(keys + row, row < rows, 0).to(tl.uint32, bitcast=True) ^ site.to(tl.uint32))
    number = (column + first_channel).to(tl.uint32)
    hashes = _mix(token + number * tl.full([1, 1], 0x9E3779B9, tl.uint32))
    offs = row * width + column
    value = tl.load(states + offs, mask, 0.0).to(tl.float32) * scale
    tl.store(output + offs, tl.where(hashes < threshold.to(tl.uint32), 0.0, value), mask)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """Apply `datapipe.targets.mix` to uint32."""
    x = (x ^ (x >> 16)) * tl.full([1, 1], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([1, 1], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


def softmax_minus_label_(logits: Tensor, labels: Tensor, writes: bool) -> Tensor:
    """Compute each row's cross-entropy, and turn logits [N, V] into its gradient in place.

    A program reads its row twice. The second time it comes from the L2 cache, since the rows in work fit into it.

    Args:
        logits: [N, V]
        labels: [N] int64
        writes: Write the gradient; otherwise the logits stay.

    Returns:
        [N, 2] fp32: the cross-entropy, and 1 where the label is the likeliest entry, else 0.
    """
    sums = torch.empty(len(logits), 2, dtype=torch.float32, device=logits.device)
    _softmax_minus_label[(len(logits),)](
        logits, labels, sums, logits.stride(0), logits.shape[1], 4096, writes, num_warps=16
    )
    return sums


@triton.jit
def _softmax_minus_label(  # type: ignore[no-untyped-def]
    logits, labels, sums, stride, width: tl.constexpr, BLOCK: tl.constexpr, WRITES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    at_label = tl.load(logits + label).to(tl.float32)  # before the reductions, whose barriers keep it before any store
    largest, powers = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, column < width, float("-inf"), eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(largest, x)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        powers = powers * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = higher
    top = tl.max(largest, 0)
    total = tl.sum(powers * tl.exp(largest - top), 0)
    tl.store(sums + 2 * row, tl.log(total) + top - at_label)
    tl.store(sums + 2 * row + 1, tl.where(at_label == top, 1.0, 0.0))
    if WRITES:
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, column < width, float("-inf"), eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp(x - top) / total - tl.where(column == label, 1.0, 0.0)
            tl.store(logits + column, gradient, column < width)


def exponentials_(logits: Tensor, largest: Tensor) -> Tensor:
    """Turn logits [N, V] into exp(logits - largest) in offs, and return their sums, [N, 1] fp32 as `largest`."""
    sums = torch.empty_like(largest)
    _exponentials[(len(logits),)](logits, largest, sums, logits.stride(0), logits.shape[1], 4096, num_warps=8)
    return sums


@triton.jit
def _exponentials(logits, largest, sums, stride, width: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    top, total = tl.load(largest + row), tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        offs = logits + row * stride + column
        power = tl.exp(tl.load(offs, column < width, float("-inf")).to(tl.float32) - top)
        total += power
        tl.store(offs, power, column < width)
    tl.store(sums + row, tl.sum(total, 0))
