"""The common parts of the products in Triton: tiles that the hardware copies, and the program of each tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_K = 64
GROUP = 8
"""Blocks of rows whose programs run one after the other, so that the weight's tiles stay in the L2 cache."""


def descriptor(tensor: Tensor) -> TensorDescriptor:
    """Describe a matrix to the hardware that copies tiles; `_set_tiles` fills in the size of a tile."""
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), [1, 16])


def grid_of(output: Tensor) -> Callable[[dict[str, int]], tuple[int]]:
    """Return the number of programs by tiling, for an output [rows, width]."""
    rows, width = output.shape
    return lambda tile: (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),)


def _set_tiles(arguments: dict[str, Any]) -> None:
    """Give each descriptor the tile that its matrix is read or written in."""
    m, n = arguments["BLOCK_M"], arguments["BLOCK_N"]
    factors = {"states": [m, BLOCK_K], "grad": [m, BLOCK_K], "back_weight": [BLOCK_K, n]}
    factors |= {name: [n, BLOCK_K] for name in ("weight", "first_weight", "second_weight")}
    for name, matrix in arguments.items():
        if isinstance(matrix, TensorDescriptor):
            matrix.block_shape = factors.get(name, [m, n])


def tiling(m: int, n: int, warps: int, stages: int) -> triton.Config:
    """Describe a tiling: rows and columns of a program's tile, its warps, and tiles under way to it."""
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": BLOCK_K, "GROUP": GROUP}
    return triton.Config(sizes, num_warps=warps, num_stages=stages, pre_hook=_set_tiles)


@triton.jit
def place(rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Find the first row and column of the program's tile."""
    high, wide = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0)
    start = program // (GROUP * wide) * GROUP
    size = tl.minimum(high - start, GROUP)
    within = program % (GROUP * wide)
    return (start + within % size) * BLOCK_M, (within // size) * BLOCK_N
