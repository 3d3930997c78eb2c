"""The shards of a checkpoint: each rank writes its own, and together they are the whole."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.megatron.optimizer_shards import tile_range
from tests.engine.world import run_world, toy_config, train


@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), data=st.data())
def test_tiles_cover_a_range_in_order(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    numbers = np.arange(count).reshape(shape)
    tiles = list(tile_range(shape, start, stop))
    pieces = [
        numbers[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))].ravel() for offset, size in tiles
    ]
    assert np.array_equal(np.concatenate([*pieces, []]), np.arange(start, stop))
    assert len(tiles) <= 2 * len(shape) - 1


def test_each_rank_writes_half(shards: Path, tmp_path: Path) -> None:
    """Each of two ranks writes half of the weights, main weights and moments."""
    run_world(2, train, toy_config(shards), tmp_path)
    (newest,) = (tmp_path / "checkpoints").glob("step-00000005")
    first, second = (sum(file.stat().st_size for file in newest.glob(f"__{rank}_*.distcp")) for rank in (0, 1))
    assert abs(second / first - 1) < 0.05
