"""The largest micro-batch that fits, from two small ones."""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from configs.schema import RunConfig
from configs.spans import PhaseSpan
from engine import micro_batch
from engine.build import build
from engine.checkpoint import describe, step_directory
from engine.micro_batch import largest_that_fits
from engine.parallel import Layout
from engine.step import StepRunner
from engine.trainer import train_loop
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

    chosen = largest_that_fits(rows, held, peak, room, lambda fits: fits)
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    best = max((size for size in divisors if needed(size) <= room), default=1)
    if rows == 1 or held + divisors[1] * (scratch + each) <= room:
        assert (chosen, tried) == (best, divisors[:2] if rows > 1 else [])
    else:
        assert (chosen, tried) == (1, [1])


class SmallDevice:
    """A device with room for 2 rows of a step."""

    def __init__(self) -> None:
        self.tried: list[int] = []

    def total(self) -> float:
        return 350 / micro_batch.MEMORY_SHARE

    def held(self) -> float:
        return 50.0

    def peak(self, rows: int) -> float:
        self.tried.append(rows)
        return 100.0 + 100.0 * rows


def _fit(remembered: Path) -> tuple[list[int], list[int]]:
    """On a rank of 4 rows: the sizes chosen at first, again, and with choices of checkpoints; and the sizes tried."""
    device = SmallDevice()
    choices = [micro_batch.fit(device, 4, "key", before, remembered) for before in (None, None, 1, None)]
    return choices, device.tried


def test_ranks_agree_and_remember(tmp_path: Path) -> None:
    remembered = tmp_path / "cache" / "micro.json"
    for rank, (sizes, tried) in enumerate(run_world(2, _fit, remembered)):
        assert sizes == [2, 2, 1, 2], rank
        assert tried == [1, 2], rank
    ((sizes, tried), _) = run_world(2, _fit, remembered)
    assert (sizes, tried) == ([2, 2, 1, 2], [])


def _train_fitted(config: RunConfig, directory: Path, remembered: Path, stop_after: int | None) -> list[int]:
    """Train as a GPU with room for 2 rows would; the rows of each micro-batch that the model was given."""

    def fit(runner: StepRunner, layout: Layout, span: PhaseSpan, choices: dict[str, int]) -> int:
        rows = span.sequences // layout.data
        choices["key"] = micro_batch.fit(SmallDevice(), rows, "key", choices.get("key"), remembered)
        return choices["key"]

    calls, rows = itertools.count(1), []
    with closing(build(config, directory, fit)) as run:
        length = config.data.sequence_length
        run.runner.ddp_model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1] // length))
        train_loop(run, lambda: "test" if stop_after and next(calls) >= stop_after else None)
    return rows


def test_a_resumed_run_keeps_its_micro_batch_on_another_host(shards: Path, tmp_path: Path) -> None:
    """The checkpoint decides, whatever the new host remembers, because another size rounds differently."""
    config = toy_config(shards, batch={"micro": "auto"})
    run, first_host, second_host = tmp_path / "run", tmp_path / "first.json", tmp_path / "second.json"
    run.mkdir()
    assert run_world(1, _train_fitted, config, run, first_host, 2) == [[2] * 4 * 2]
    second_host.write_text(json.dumps({"key": 1}))
    assert run_world(1, _train_fitted, config, run, second_host, None) == [[2] * 4 * 3]
    assert describe(step_directory(run / "checkpoints", 5)).micro_batches == {"key": 2}
