"""Non-finite steps, loss spikes, replicas that differ, and checkpoints that cannot be written."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from configs.schema import RunConfig
from datapipe.batch import IGNORE, StepData
from datapipe.loader import Loader
from engine.build import build
from engine.checkpoint import latest_valid, step_of
from engine.guards import Guards, verdict
from engine.step import to_device_batch, weight_buffers
from engine.trainer import train_loop
from monitoring.log import read_events, read_metrics
from tests.engine.world import run_world, stored, toy_config


class SpoilForward(torch.autograd.Function):
    """NaN forward; backward gives the gradients of an undisturbed forward."""

    @staticmethod
    def forward(context: Any, output: torch.Tensor) -> torch.Tensor:
        return output * math.nan

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def train_poisoned(config: RunConfig, directory: Path, poisoned: set[int], gradient: bool = True) -> Any:
    """Train with a loss of NaN for the second micro-batch of these steps (from 1), and a gradient of NaN or not."""
    calls = itertools.count()
    per_step = config.batch.sequences // int(config.batch.micro)

    def poison(model: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        step, number = divmod(next(calls), per_step)
        if step + 1 not in poisoned or number != 1:
            return output
        return output * math.nan if gradient else SpoilForward.apply(output)

    with closing(build(config, directory)) as run:
        run.runner.ddp_model.register_forward_hook(poison)
        return train_loop(run)


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


def train_without_labels(config: RunConfig, directory: Path, unlabelled: int) -> Any:
    """Train; no token of one step (from 1) has a label."""
    steps = Loader.steps

    def spoilt(*args: Any, **more: Any) -> Iterator[StepData]:
        for batch in steps(*args, **more):
            if batch.step + 1 == unlabelled:
                bare = [replace(one, labels=np.full_like(one.labels, IGNORE)) for one in batch.micro_batches]
                batch = replace(batch, micro_batches=tuple(bare), staged=tuple(map(to_device_batch, bare)))
            yield batch

    with mock.patch.object(Loader, "steps", spoilt), closing(build(config, directory)) as run:
        return train_loop(run)


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_step_without_labels_changes_nothing(parallel: int, shards: Path, tmp_path: Path) -> None:
    """Weight decay and momentum alone must not move the weights, and a loss of 0 must not look learned."""
    layout = {"tensor": parallel, "pipeline": parallel}
    config = toy_config(shards, checkpoint={"every": "1 steps", "keep": 9}, parallel=layout)
    run_world(parallel**2, train_without_labels, config, tmp_path, 4)
    (event,) = events(tmp_path, "step_skipped")
    assert event["step"] == 4 and "label" in event["where"]
    assert [line["loss"] is None for line in read_metrics(tmp_path)] == [False, False, False, True, False]
    before, after, later = (stored(tmp_path, step) for step in (3, 4, 5))
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


def train_with_a_flipped_bit(config: RunConfig, directory: Path, at_step: int, stop_after: int | None = None) -> Any:
    """Train; rank 1's copy of a weight that rank 0 updates changes silently after the forward pass of a step."""
    passes = itertools.count(1)
    per_rank = config.batch.sequences // dist.get_world_size() // int(config.batch.micro)
    calls = itertools.count(1)

    def flip(model: Any, *_: Any) -> None:
        if next(passes) == at_step * per_rank and dist.get_rank() == 1:
            (weights, *_others) = weight_buffers(model)
            weights.view(torch.int32)[0] ^= 1

    with closing(build(config, directory)) as run:
        run.checkpoints.clock = itertools.count(0, 25).__next__
        run.state.saved_at = 0.0
        run.runner.ddp_model.register_forward_hook(flip)
        return train_loop(run, lambda: "test" if stop_after and next(calls) >= stop_after else None)


@pytest.mark.parametrize(
    ("every", "stop_after", "good"),
    [("2 steps", None, [2, 3]), ("1 minutes", None, [3]), ("100 steps", None, [3]), ("100 steps", 4, [3])],
    ids=["steps", "minutes", "end of the run", "stop"],
)
def test_replicas_that_differ_stop_the_run_before_it_saves(
    every: str, stop_after: int | None, good: list[int], shards: Path, tmp_path: Path
) -> None:
    """Each checkpoint is compared first, whatever asks for it: the weight differs in step 4 alone."""
    config = toy_config(shards, checkpoint={"every": every})
    with pytest.raises(
        AssertionError, match=r"RunFailedError: step [45]: .* ranks \[0\] and ranks \[1\] differ, and no"
    ):
        run_world(2, train_with_a_flipped_bit, config, tmp_path, 4, stop_after)
    assert sorted(step_of(path) for path in (tmp_path / "checkpoints").glob("step-*")) == good


def test_the_majority_of_the_replicas_is_believed() -> None:
    assert verdict([[0, 2, 4, 6]]) == ""
    assert verdict([[0], [2, 4, 6]]) == "ranks [0] differ from the majority, ranks [2, 4, 6]"
    assert verdict([[0, 6], [2, 4]]) == "ranks [0, 6] and ranks [2, 4] differ, and no majority tells which are right"


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
    """Train; at these steps a save fails.

    how: the disk is full before the save, as rank 0 writes its part, or as it ends the checkpoint; or rank 1 writes to
    a disk of its own.
    """
    with closing(build(config, directory)) as run:
        writer = run.checkpoints.writer
        usage, write_part, write_file = shutil.disk_usage, writer.write_part, writer.write_file

        def fails(where: str, hidden: Path) -> bool:
            # By the checkpoint's own name: training may be steps ahead of the thread that writes it.
            return where == how and any(f"step-{step:08d}" in hidden.name for step in steps)

        def full_disk(path: Any) -> Any:
            return namedtuple("usage", "total used free")(1, 1, 0) if fails("before", Path(path)) else usage(path)

        def bad_part(hidden: Path) -> Any:
            if fails("writing", hidden) and dist.get_rank() == 0:
                raise OSError(28, "No space left on device")
            if fails("elsewhere", hidden) and dist.get_rank() == 1:
                hidden = directory / "elsewhere"
                hidden.mkdir(exist_ok=True)
            return write_part(hidden)

        def bad_file(path: Path, content: bytes) -> None:
            if fails("ending", path.parent) and path.name == "detour.json":
                raise OSError(28, "No space left on device")
            write_file(path, content)

        writer.write_part, writer.write_file = bad_part, bad_file  # type: ignore[method-assign]
        shutil.disk_usage = full_disk
        return train_loop(run)


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
