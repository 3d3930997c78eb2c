"""Norm and GeGLU in Triton with results in FP8, by rows and transposed. Arithmetic is in fp32.

A result is rounded to BF16 before it is cast, so that its bits are those of a cast of the BF16 result. The cast is the
GPU's own instruction, which saturates, as in Transformer Engine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.modernbert.kernels import pointwise
from engine.modernbert.kernels.pointwise import gate, gate_gradients

TILE, WARPS = 64, 8
"""Rows and columns of a tile of GeGLU, whose copies are written in pieces of 64 bytes, and warps per program."""
ROWS, COLUMNS = 32, 64
"""Rows per program of the norm, and the columns that it casts at once."""
GRADIENT_COLUMNS = 32
"""Columns that the norm's backward pass casts at once; 64 of them would take 148 registers for 95."""

Target = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Tensors of a result [..., n] in FP8.

A kernel writes the data [..., n] and [n, ...] uint8, and the inverse of the scale, [1] fp32. It reads the scale, []
fp32, and raises the largest magnitude so far, [1] fp32.
"""


def geglu(states: Tensor, target: Target) -> None:
    """Write the exact GELU of the first half times the second half as E4M3, [..., 2 n] -> [..., n]."""
    rows, width = _shape(target[0])
    _geglu[_tiles(rows, width)](states, *target, rows, width, TILE, num_warps=WARPS)


def geglu_backward(states: Tensor, grad: Tensor, target: Target) -> None:
    """Write the gradient of both halves as E5M2.

    Args:
        states: [..., 2 n] BF16
        grad: [..., n] BF16
        target: For [..., 2 n].
    """
    rows, width = _shape(grad)
    _geglu_backward[_tiles(rows, width)](states, grad, *target, rows, width, TILE, num_warps=WARPS)


def add_and_norm(
    states: Tensor, other: Tensor | None, weight: Tensor, eps: float, target: Target
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the LayerNorm of `states + other`, [..., h] BF16 each, as E4M3.

    Returns:
        The sum [..., h], and mean and inverse standard deviation of each row, [rows] fp32.
    """
    rows, width = _shape(states)
    total = states if other is None else torch.empty_like(states)
    added = states if other is None else other
    mean, inverse = torch.empty(2, rows, dtype=torch.float32, device=states.device)
    block = triton.next_power_of_2(width)
    _norm[(triton.cdiv(rows, ROWS),)](
        states, added, total, weight, mean, inverse, *target, rows, width, eps, other is not None, ROWS, COLUMNS, block,
        num_warps=pointwise.warps(block),  # as the norm that writes BF16, so that both add in the same order
    )  # fmt: skip
    return total, mean, inverse


def norm_backward(
    states: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, kept: Tensor, normed: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """Write the gradient of `states` as E5M2.

    Args:
        states: [..., h] BF16, the normalised sum.
        weight: [h]
        mean: Mean of each row, [rows] fp32.
        inverse: Inverse standard deviation of each row, [rows] fp32.
        kept: Gradient of the sum, [..., h] BF16.
        normed: Gradient of the norm, [..., h] BF16.
        target: For [..., h].

    Returns:
        The gradient in BF16, and the weight's, [h] fp32.
    """
    rows, width = _shape(states)
    result, block = torch.empty_like(states), triton.next_power_of_2(width)
    programs = triton.cdiv(rows, pointwise.ROWS_PER_PROGRAM)
    parts = torch.empty(programs, width, dtype=torch.float32, device=states.device)
    _norm_backward[(programs,)](
        states, weight, mean, inverse, kept, normed, result, parts, *target, rows, width,
        pointwise.ROWS_PER_PROGRAM, GRADIENT_COLUMNS, block, num_warps=pointwise.warps(block),
    )  # fmt: skip
    return result, parts.sum(dim=0)


def _shape(states: Tensor) -> tuple[int, int]:
    width = states.shape[-1]
    return states.numel() // width, width


def _tiles(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, TILE), triton.cdiv(width, TILE)


@triton.jit
def _tile(rows, width, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def write(value, data, transposed, scale, row, column, rows, width, mask, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a tile of BF16 values as FP8 in both copies, and return its magnitudes."""
    value = value.to(tl.float32)
    cast = (value * tl.load(scale)).to(FORMAT).to(tl.uint8, bitcast=True)
    tl.store(data + row * width + column, cast, mask)
    tl.store(transposed + column * rows + row, cast, mask)
    return tl.where(mask, tl.abs(value), 0.0)


@triton.jit
def largest(magnitudes):  # type: ignore[no-untyped-def]
    """Return the largest of a tile of magnitudes."""
    return tl.max(tl.max(magnitudes, 1), 0)


@triton.jit
def finish(magnitude, inverse, scale, amax):  # type: ignore[no-untyped-def]
    """Raise amax to the program's largest magnitude, and store the inverse of the scale once.

    Floats that are not negative are ordered as their bits are. A maximum does not depend on the order of programs.
    """
    bits = magnitude.to(tl.int32, bitcast=True)
    tl.atomic_max(amax.to(tl.pointer_type(tl.int32), bitcast=True), bits, sem="relaxed")
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(inverse, tl.div_rn(1.0, tl.load(scale)))


@triton.jit
def _geglu(  # type: ignore[no-untyped-def]
    states, data, transposed, scale_inverse, scale, amax, rows, width: tl.constexpr, TILE: tl.constexpr
):
    row, column, mask = _tile(rows, width, TILE)
    offs = row * (2 * width) + column
    first = tl.load(states + offs, mask, 0.0).to(tl.float32)
    second = tl.load(states + offs + width, mask, 0.0).to(tl.float32)
    result = gate(first, second).to(states.dtype.element_ty)
    magnitudes = write(result, data, transposed, scale, row, column, rows, width, mask, tl.float8e4nv)
    finish(largest(magnitudes), scale_inverse, scale, amax)


@triton.jit
def _geglu_backward(  # type: ignore[no-untyped-def]
    states, grad, data, transposed, scale_inverse, scale, amax, rows, width: tl.constexpr, TILE: tl.constexpr
):
    row, column, mask = _tile(rows, width, TILE)
    offs = row * (2 * width) + column
    first = tl.load(states + offs, mask, 0.0).to(tl.float32)
    second = tl.load(states + offs + width, mask, 0.0).to(tl.float32)
    grad_output = tl.load(grad + row * width + column, mask, 0.0).to(tl.float32)
    left, right = gate_gradients(first, second, grad_output)
    left, right = left.to(states.dtype.element_ty), right.to(states.dtype.element_ty)
    magnitudes = write(left, data, transposed, scale, row, column, rows, 2 * width, mask, tl.float8e5)
    column += width
    others = write(right, data, transposed, scale, row, column, rows, 2 * width, mask, tl.float8e5)
    finish(largest(tl.maximum(magnitudes, others)), scale_inverse, scale, amax)


@triton.jit
def _sum(states, added, offs, mask, ADDS: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(states + offs, mask, 0.0).to(tl.float32)
    if ADDS:
        x += tl.load(added + offs, mask, 0.0).to(tl.float32)
        x = x.to(states.dtype.element_ty).to(tl.float32)  # the norm sees the rounded sum, as the next layers do
    return x


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    states, added, total, weight, mean, inverse, data, transposed, scale_inverse, scale, amax, rows, width, eps,
    ADDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows: first the statistics, one row after the other, then tiles for both copies.

    The tiles load the summands again. Whole rows at once would not fit into the registers.
    """
    start = tl.program_id(0).to(tl.int64) * ROWS
    place = tl.arange(0, ROWS)
    averages, deviations = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for step in range(ROWS):
        column = tl.arange(0, BLOCK)
        mask = (column < width) & (start + step < rows)
        offs = (start + step) * width + column
        x = _sum(states, added, offs, mask, ADDS)
        if ADDS:
            tl.store(total + offs, x, mask)
        average = tl.sum(x, 0) / width
        centred = tl.where(mask, x - average, 0.0)
        deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
        averages = tl.where(place == step, average, averages)
        deviations = tl.where(place == step, deviation, deviations)
    tl.store(mean + start + place, averages, start + place < rows)
    tl.store(inverse + start + place, deviations, start + place < rows)
    row, magnitudes = (start + place)[:, None], tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        mask = (row < rows) & (column < width)
        x = _sum(states, added, row * width + column, mask, ADDS)
        w = tl.load(weight + column, column < width, 0.0).to(tl.float32)
        result = ((x - averages[:, None]) * deviations[:, None] * w).to(states.dtype.element_ty)
        written = write(result, data, transposed, scale, row, column, rows, width, mask, tl.float8e4nv)
        magnitudes = tl.maximum(magnitudes, written)
    finish(largest(magnitudes), scale_inverse, scale, amax)


@triton.jit
def _norm_backward(  # type: ignore[no-untyped-def]
    states, weight, mean, inverse, kept, normed, result, parts, data, transposed, scale_inverse, scale, amax,
    rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradient in BF16, and load it again in tiles that are cast for both copies."""
    pointwise.norm_backward(states, weight, mean, inverse, kept, normed, result, parts, rows, width, ROWS, BLOCK)
    tl.debug_barrier()  # other threads have stored what is loaded from here on
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    magnitudes = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        mask = (row < rows) & (column < width)
        value = tl.load(result + row * width + column, mask, 0.0)
        written = write(value, data, transposed, scale, row, column, rows, width, mask, tl.float8e5)
        magnitudes = tl.maximum(magnitudes, written)
    finish(largest(magnitudes), scale_inverse, scale, amax)
