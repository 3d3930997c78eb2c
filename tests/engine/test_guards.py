"""Numbers that go wrong, and checkpoints that cannot be written."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import RunConfig
from engine.checkpoint import latest_valid, step_of
from engine.guards import Guards, _verdict
from monitoring.log import read_events, read_metrics
from tests.engine.world import run_world, stored, toy_config, train


def train_poisoned(config: RunConfig, directory: Path, poisoned: set[int], gradient: bool = True) -> Any:
    """Train with a loss of NaN for the second micro-batch of these steps (from 1), and a gradient of NaN or not."""
    from engine import step as module

    original, calls = module._forward, iter(range(10**9))
    per_step = config.batch.sequences // int(config.batch.micro)

    def forward(*args: Any) -> Any:
        output, loss = original(*args)
        step, number = divmod(next(calls), per_step)
        if step + 1 not in poisoned or number != 1:
            return output, loss
        return (output * math.nan, loss) if gradient else (output, lambda sums: spoilt(*loss(sums)))

    def spoilt(total: Any, count: Any, logged: dict[str, Any]) -> Any:
        return total, count, {name: value * math.nan for name, value in logged.items()}

    module._forward = forward
    return train(config, directory)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(directory) if event["event"] == kind]


@pytest.mark.parametrize(("parallel", "gradient"), [(1, True), (1, False), (2, True)])
def test_a_step_that_is_not_finite_changes_nothing(parallel: int, gradient: bool, shards: Path, tmp_path: Path) -> None:
    layout = {"tensor": parallel, "pipeline": parallel}
    config = toy_config(shards, checkpoint={"every": "1 steps", "keep": 9}, parallel=layout)
    outcomes = run_world(parallel**2, train_poisoned, config, tmp_path, {2}, gradient)
    assert all(outcome.finished for outcome in outcomes)
    (event,) = events(tmp_path, "step_skipped")
    assert event["step"] == 2
    # Two rows a stream and step; the second micro-batch of two rows is the second stream's.
    named = re.findall(
        rf"rank {parallel**2 - 1}: sequence (\d) of stream 1 \(((?:en|fr)/\S+\.tar document \d+)", event["where"]
    )
    assert [number for number, _ in named] == ["2", "3"]
    assert [line["loss"] is None for line in read_metrics(tmp_path)] == [False, True, False, False, False]
    before, after, later = (stored(tmp_path, step) for step in (1, 2, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in later.items())


def test_a_run_without_finite_gradients_stops_with_a_diagnosis(shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, phases=[{"objective": "clm", "steps": 9}], checkpoint={"every": "2 steps"})
    with pytest.raises(
        AssertionError, match=r"RunFailedError: step 7: no finite loss and gradient in 5 steps in a row \(rank 0"
    ):
        run_world(1, train_poisoned, config, tmp_path, set(range(3, 10)))
    newest, damaged = latest_valid(tmp_path / "checkpoints")
    assert newest is not None and not damaged
    good, kept = stored(tmp_path, 2), stored(tmp_path, step_of(newest))
    assert all(torch.equal(tensor, good[name]) for name, tensor in kept.items())


def train_with_a_flipped_bit(config: RunConfig, directory: Path) -> Any:
    """Train; rank 1's copy of one weight changes silently in step 4."""
    import torch.distributed as dist

    from engine import trainer as module

    original = module.require_equal_replicas

    def compare(model: Any, step: int) -> None:
        if step == 4 and dist.get_rank() == 1:
            weight = next(model.parameters())
            weight.data.view(torch.int32)[0, 0] ^= 1
        original(model, step)

    module.require_equal_replicas = compare
    return train(config, directory)


def test_replicas_that_differ_stop_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"RunFailedError: step 4: .* ranks \[0\] and ranks \[1\] differ, and no maj"
    ):
        run_world(2, train_with_a_flipped_bit, toy_config(shards, checkpoint={"every": "2 steps"}), tmp_path)
    assert max((tmp_path / "checkpoints").glob("step-*")).name == "step-00000003"


def test_the_majority_of_the_replicas_is_believed() -> None:
    assert _verdict([[0, 2, 4, 6]]) == ""
    assert _verdict([[0], [2, 4, 6]]) == "ranks [0] differ from the majority, ranks [2, 4, 6]"
    assert _verdict([[0, 6], [2, 4]]) == "ranks [0, 6] and ranks [2, 4] differ, and no majority tells which are right"


def test_a_spike_is_told_from_noise_also_after_a_restart(alone: None, tmp_path: Path) -> None:
    noise = random.Random(7)
    guards = Guards(tmp_path)
    for step in range(1, 200):
        if step == 100:
            guards = Guards(tmp_path, json.loads(json.dumps(guards.state())))
        loss = 9.0 if step == 120 else 5 - step / 100 + noise.gauss(0, 0.05)
        guards.check(step, "clm", loss, 1.0, [])
    (spike,) = events(tmp_path, "loss_spike")
    assert spike["step"] == 120 and spike["loss"] == 9.0 and 3.5 < spike["usual"] < 4.5


def train_with_a_bad_disk(config: RunConfig, directory: Path, how: str, steps: set[int]) -> Any:
    """Train; at these steps the disk is full before a save, as rank 0 writes its part, or as it ends the checkpoint; or
    rank 1 writes to a disk of its own."""
    import shutil
    from collections import namedtuple

    import torch.distributed as dist

    from engine import saver

    now = {"step": 0}
    begin, usage, write, write_bytes = saver.Saver.begin, shutil.disk_usage, saver.Saver._write, saver._write_bytes

    def watched_begin(self: Any, checkpoint: Path, *args: Any) -> None:
        now["step"] = int(checkpoint.name[-8:])
        begin(self, checkpoint, *args)

    def disk_usage(path: Any) -> Any:
        full = how == "before" and now["step"] in steps
        return namedtuple("usage", "total used free")(1, 1, 0) if full else usage(path)

    def write_part(self: Any, hidden: Path, *args: Any) -> Any:
        if now["step"] in steps:
            if how == "writing" and dist.get_rank() == 0:
                raise OSError(28, "No space left on device")
            if how == "elsewhere" and dist.get_rank() == 1:
                hidden = directory / "elsewhere"
                hidden.mkdir(exist_ok=True)
        return write(self, hidden, *args)

    def write_last(path: Path, content: bytes) -> None:
        if how == "ending" and now["step"] in steps and path.name == "detour.json":
            raise OSError(28, "No space left on device")
        write_bytes(path, content)

    saver.Saver.begin, saver.Saver._write, saver._write_bytes = watched_begin, write_part, write_last
    shutil.disk_usage = disk_usage
    return train(config, directory)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("before", "GB are needed"),
        ("writing", "rank 0: .*No space left"),
        ("ending", "No space left"),
        ("elsewhere", "must lie on storage that all nodes share"),
    ],
)
def test_training_survives_a_save_that_fails(how: str, complaint: str, shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, checkpoint={"every": "1 steps", "keep": 9})
    outcomes = run_world(2, train_with_a_bad_disk, config, tmp_path, how, {2, 3})
    # The save of step 3, a phase's end, is waited for: training goes on without it too.
    assert all(outcome.finished for outcome in outcomes)
    assert [event["step"] for event in events(tmp_path, "checkpoint_saved")] == [1, 4, 5]
    failed = events(tmp_path, "checkpoint_failed")
    assert len(failed) == 2 and all(re.search(complaint, event["reason"]) for event in failed)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-0000000{step}" for step in (1, 4, 5)
    ]


def test_a_last_checkpoint_that_cannot_be_written_fails_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"RunFailedError: .* GB are needed. Free space and run again"):
        run_world(1, train_with_a_bad_disk, toy_config(shards), tmp_path, "before", {5})
