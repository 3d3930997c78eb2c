"""Numbers that go wrong, and checkpoints that cannot be written."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import RunConfig
from engine.checkpoint import latest_valid, step_of
from monitoring.log import read_events, read_metrics
from tests.engine.world import run_world, stored, toy_config, train


def train_poisoned(config: RunConfig, directory: Path, poisoned: set[int]) -> Any:
    """Train with a loss of NaN for the second micro-batch of these steps (from 1)."""
    from engine import step as module

    original, calls = module._forward, iter(range(10**9))
    per_step = config.batch.sequences // int(config.batch.micro)

    def forward(*args: Any) -> Any:
        output, loss = original(*args)
        step, number = divmod(next(calls), per_step)
        return (output * math.nan if step + 1 in poisoned and number == 1 else output), loss

    module._forward = forward
    return train(config, directory)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(directory) if event["event"] == kind]


def test_a_step_without_a_finite_gradient_changes_nothing(shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, checkpoint={"every": "1 steps", "keep": 9})
    (outcome,) = run_world(1, train_poisoned, config, tmp_path, {2})
    assert outcome.finished
    (event,) = events(tmp_path, "step_skipped")
    assert event["step"] == 2
    # Two rows a stream and step; the second micro-batch of two rows is the second stream's.
    named = re.findall(r"rank 0: sequence (\d) of stream 1 \(((?:en|fr)/\S+\.tar document \d+)", event["where"])
    assert [number for number, _ in named] == ["2", "3"]
    assert [line["loss"] is None for line in read_metrics(tmp_path)] == [False, True, False, False, False]
    before, after, later = (stored(tmp_path, step) for step in (1, 2, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in later.items())


def test_a_run_without_finite_gradients_stops_with_a_diagnosis(shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, phases=[{"objective": "clm", "steps": 9}], checkpoint={"every": "2 steps"})
    with pytest.raises(
        AssertionError, match=r"RunFailedError: step 7: no finite gradient in 5 steps in a row \(rank 0"
    ):
        run_world(1, train_poisoned, config, tmp_path, set(range(3, 10)))
    newest, damaged = latest_valid(tmp_path / "checkpoints")
    assert newest is not None and not damaged
    good, kept = stored(tmp_path, 2), stored(tmp_path, step_of(newest))
    assert all(torch.equal(tensor, good[name]) for name, tensor in kept.items())


def train_with_a_flipped_bit(config: RunConfig, directory: Path) -> Any:
    """Train; rank 1's copy of one weight changes silently after the checkpoint of step 3."""
    import torch.distributed as dist

    from engine import trainer as module

    original = module._begin_save

    def begin_save(trainer: Any, span: Any, step: int, stopping: bool) -> None:
        original(trainer, span, step, stopping)
        if step == 3 and dist.get_rank() == 1:
            weight = next(trainer.model.parameters())
            weight.data.view(torch.int32)[0, 0] ^= 1

    module._begin_save = begin_save
    return train(config, directory)


def test_replicas_that_differ_stop_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"RunFailedError: step 4: the weights of ranks \[1\] differ"):
        run_world(2, train_with_a_flipped_bit, toy_config(shards, checkpoint={"every": "2 steps"}), tmp_path)
    assert max((tmp_path / "checkpoints").glob("step-*")).name == "step-00000003"


def train_with_a_full_disk(config: RunConfig, directory: Path, how: str, steps: set[int]) -> Any:
    """Train; the saves at these steps find the disk full, before they start or on rank 0 as it writes."""
    import shutil
    from collections import namedtuple

    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from engine import saver

    now = {"step": 0}
    begin, usage = saver.Saver.begin, shutil.disk_usage
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def watched_begin(self: Any, checkpoint: Path, *args: Any) -> None:
        now["step"] = int(checkpoint.name[-8:])
        begin(self, checkpoint, *args)

    def disk_usage(path: Any) -> Any:
        full = how == "before" and now["step"] in steps
        return namedtuple("usage", "total used free")(1, 1, 0) if full else usage(path)

    def write_data(transforms: Any, number: int, bucket: Any, results: Any, count: Any, fsync: bool) -> None:
        if how == "writing" and now["step"] in steps and dist.get_rank() == 0:
            results.put((number, OSError(28, "No space left on device")))
        else:
            write(transforms, number, bucket, results, count, fsync)

    saver.Saver.begin, shutil.disk_usage = watched_begin, disk_usage
    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(write_data)
    return train(config, directory)


@pytest.mark.parametrize("how", ["before", "writing"])
def test_training_survives_a_full_disk(how: str, shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, checkpoint={"every": "1 steps", "keep": 9})
    outcomes = run_world(2, train_with_a_full_disk, config, tmp_path, how, {2, 3})
    assert all(outcome.finished for outcome in outcomes)
    assert [event["step"] for event in events(tmp_path, "checkpoint_saved")] == [1, 4, 5]
    assert len(events(tmp_path, "checkpoint_failed")) == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-0000000{step}" for step in (1, 4, 5)
    ]


def test_a_last_checkpoint_that_cannot_be_written_fails_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"RunFailedError: .* GB are needed. Free space and run again"):
        run_world(1, train_with_a_full_disk, toy_config(shards), tmp_path, "before", {5})
