"""The largest micro-batch that fits, from two small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.micro import largest_that_fits
from tests.engine.world import run_world, toy_config


@given(
    rows=st.integers(1, 96),
    held=st.integers(0, 1000),
    scratch=st.integers(0, 200),
    each=st.integers(1, 100),
    room=st.integers(0, 5000),
)
def test_largest_divisor_within_the_room(rows: int, held: int, scratch: int, each: int, room: int) -> None:
    tried: list[int] = []

    def needed(size: int) -> int:
        return held + scratch + each * size

    def peak(size: int) -> float:
        assert size == 1 or needed(size) <= room, "what does not fit is never tried"
        tried.append(size)
        return needed(size)

    found = largest_that_fits(rows, held, peak, room, lambda fits: fits)
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    best = max((size for size in divisors if needed(size) <= room), default=1)
    if rows == 1 or held + divisors[1] * (scratch + each) <= room:
        assert (found, tried) == (best, divisors[:2] if rows > 1 else [])
    else:
        assert (found, tried) == (1, [1])


def _fit(shards: Path, scratch: Path, memory: Path) -> tuple[list[int], list[int]]:
    """On a rank with a device too small for more than 2 of its 4 rows: what is found the first time, again, with a
    checkpoint of this layout, with one of another; and what was tried for it."""
    from engine import micro
    from engine.setup import open_trainer

    tried: list[int] = []

    def peak(trainer: Any, size: int) -> float:
        tried.append(size)
        return 100.0 + 100.0 * size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro, "_peak_bytes", peak)
        patch.setattr(micro, "_held_bytes", lambda: 50.0)
        patch.setattr(micro.device, "total_memory_bytes", lambda: 350 / micro.SHARE)
        trainer = open_trainer(toy_config(shards), scratch)
        key, first = micro.fit_micro_batch(trainer, None, memory)
        found = [first] + [
            micro.fit_micro_batch(trainer, *more)[1] for more in ((None, memory), ((key, 1),), (("", 1), memory))
        ]
        trainer.close()
    return found, tried


def test_ranks_agree_and_remember(shards: Path, tmp_path: Path) -> None:
    memory = tmp_path / "cache" / "micro.json"
    for rank, (found, tried) in enumerate(run_world(2, _fit, shards, tmp_path, memory)):
        assert found == [2, 2, 1, 2], rank
        assert tried == [1, 2], rank
    ((found, tried), _) = run_world(2, _fit, shards, tmp_path, memory)
    assert (found, tried) == ([2, 2, 1, 2], [])
