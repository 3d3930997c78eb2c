"""Changes to the model whose gain on a GPU is predicted and not measured yet: `python -m benchmarks.gpu changes`.

A change that is in by default was sure to pay. Each other one is off, because only a GPU can say whether it pays. Where
it does, it moves into the engine; where it does not, it is deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.changes import tuned_products
from benchmarks.changes.layer_graphs import graphs_of_local_layers
from engine.modernbert import layers
from engine.modernbert.attention import PackedDocuments

BASE_CLM, BASE_MLM, LARGE_CLM = "base, CLM, bf16", "base, MLM 15 %, bf16", "large, CLM, bf16"
FOUR_ROWS, ONE_ROW = "base, CLM, bf16, 4 rows per step", "base, CLM, bf16, 1 row per step"
LARGE_FP8, BILLION_FP8 = "large, CLM, fp8 delayed, 8 rows per step", "1B, CLM, fp8 delayed, 4 rows per step"
"""Runs that a change is measured in, as `benchmarks.gpu.CHANGE_RUNS` describes them."""
LOCAL_TILES = (
    (128, 64, {"num_stages": 1, "num_warps": 8}),
    (64, 32, {"num_stages": 1, "num_warps": 8, "maxnreg": 128}),
)
"""Other values of the local attention kernels' BLOCK_M, BLOCK_N and OPTIONS."""


class Change(NamedTuple):
    """A change to the model: whether it is in by default, and how a run has the other of the two."""

    predicted: dict[str, float | None]
    """Milliseconds that it adds to a step, by the name of a run; None where nobody knows."""
    is_default: bool
    other: Callable[[], AbstractContextManager[Any]] = nullcontext
    settings: dict[str, Any] | None = None


def _tiles(sizes: tuple[int, int, dict[str, int]]) -> AbstractContextManager[Any]:
    from engine.modernbert.kernels import attention  # needs Triton

    return mock.patch.multiple(attention, BLOCK_M=sizes[0], BLOCK_N=sizes[1], OPTIONS=sizes[2])


def _geglu_in_products() -> AbstractContextManager[Any]:
    from benchmarks.changes import geglu_products  # needs Triton

    return geglu_products.geglu_in_products()


def _residuals_in_products() -> AbstractContextManager[Any]:
    from benchmarks.changes import residual_products  # needs Triton

    return residual_products.residuals_in_products()


def _fp8_casts() -> AbstractContextManager[Any]:
    from benchmarks.changes.fp8_casts import fp8_casts  # needs Transformer Engine

    return fp8_casts()


def _whole(*arguments: Any, of: Any = PackedDocuments.from_lengths) -> PackedDocuments:
    """`PackedDocuments.from_lengths` without its last argument, so that the last layer computes every position."""
    packed: PackedDocuments = of(*arguments[:4])
    return packed


CHANGES = {
    "plain linear layers": Change(
        {BASE_CLM: -3, BASE_MLM: -3, LARGE_CLM: -2},
        True,
        lambda: mock.patch.object(layers, "takes_plain_linears", lambda _: False),
    ),
    "last layer where it pays": Change(
        {BASE_MLM: -12}, True, lambda: mock.patch.object(PackedDocuments, "from_lengths", _whole)
    ),
    "flash-attn-4": Change(
        {BASE_CLM: -8, BASE_MLM: -15, LARGE_CLM: -12}, False, settings={"attention": "flash_attn_4"}
    ),
    "local attention in tiles of 128 x 64, 8 warps": Change(
        {BASE_CLM: -9, BASE_MLM: -12, LARGE_CLM: -15}, False, partial(_tiles, LOCAL_TILES[0])
    ),
    "local attention in tiles of 64 x 32, 8 warps": Change(
        {BASE_CLM: -7, BASE_MLM: -9, LARGE_CLM: -11}, False, partial(_tiles, LOCAL_TILES[1])
    ),
    "GeGLU in the products beside it": Change({BASE_CLM: -7, BASE_MLM: -7, LARGE_CLM: -20}, False, _geglu_in_products),
    "residual sums in the products before them": Change(
        {BASE_CLM: -2.9, BASE_MLM: -2.9, LARGE_CLM: -4.8}, False, _residuals_in_products
    ),
    "products by shape": Change({BASE_CLM: -8, BASE_MLM: -8, LARGE_CLM: -20}, False, tuned_products.by_shape),
    "cuBLASLt": Change(dict.fromkeys((BASE_CLM, BASE_MLM, LARGE_CLM)), False, tuned_products.by_cublaslt),
    "CUDA graphs of the local layers": Change({FOUR_ROWS: 2, ONE_ROW: -7}, False, graphs_of_local_layers),
    "FP8 written where it is computed": Change({LARGE_FP8: -28, BILLION_FP8: -21}, False, _fp8_casts),
}
