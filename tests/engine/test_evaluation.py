"""The held-out set: both losses in either phase, without an effect on the training."""

from __future__ import annotations

import itertools
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForMaskedLM

from configs.schema import RunConfig
from datapipe.batch import IGNORE
from datapipe.loader import evaluation_batches
from datapipe.tokenizer import load_tokenizer
from engine.checkpoint import step_directory
from engine.export import export_hf
from engine.objectives import MaskedLM
from monitoring.log import read_metrics
from monitoring.telemetry import Telemetry
from tests.engine.world import run_world, stored, toy_config, train


def with_evaluation(shards: Path) -> RunConfig:
    held_out = {"shards": str(shards / "fr"), "every": "2 steps", "sequences": 6, "mask_rate": 0.3}
    return toy_config(shards, data={"evaluation": held_out})


@pytest.mark.parametrize(
    ("workers", "parallel"), [(1, {}), (4, {"tensor": 2, "pipeline": 2})], ids=["alone", "tp2-pp2"]
)
def test_evaluation_changes_nothing(
    workers: int, parallel: dict[str, int], shards: Path, alone_run: Path, tmp_path: Path
) -> None:
    config = with_evaluation(shards).model_copy(update={"parallel": toy_config(shards, parallel=parallel).parallel})
    run_world(workers, train, config, tmp_path)
    lines = read_metrics(tmp_path)
    assert [sorted(line.get("eval_loss", {})) for line in lines] == [
        [],
        ["clm", "mlm"],
        [],
        ["clm", "mlm"],
        ["clm", "mlm"],
    ]
    if workers == 1:
        final, expected = stored(tmp_path, 5), stored(alone_run, 5)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in final.items())

    tokenizer = load_tokenizer(config.tokenizer)
    objective = MaskedLM(config.phases[1], tokenizer, config.data.seed)
    (micro,) = evaluation_batches(config.data, objective.targets(), 6, tokenizer, 0, 1)
    export_hf(step_directory(tmp_path / "checkpoints", 5), tmp_path / "hf", tokenizer)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    bounds = [int(bound) for bound in micro.cu_seqlens]
    labels = torch.from_numpy(micro.labels)
    with torch.no_grad():
        logits = [
            model(torch.from_numpy(micro.inputs[None, start:end])).logits[0]
            for start, end in itertools.pairwise(bounds)
        ]
        expected_loss = torch.nn.functional.cross_entropy(torch.cat(logits), labels, ignore_index=IGNORE)
    assert lines[-1]["eval_loss"]["mlm"] == pytest.approx(float(expected_loss), rel=1e-5)
    accuracy = (torch.cat(logits).argmax(dim=1) == labels)[labels != IGNORE].float().mean()
    assert lines[-1]["eval_accuracy"]["mlm"] == pytest.approx(float(accuracy), abs=1e-9)
    assert lines[-1]["eval_loss"]["clm"] != lines[-1]["eval_loss"]["mlm"]


def train_with_a_slow_rank(config: RunConfig, directory: Path) -> None:
    """Rank 1 sleeps in both forward passes of the last of five steps."""
    from engine.build import build
    from engine.trainer import train_loop

    passes = itertools.count(1)
    with closing(build(config, directory)) as run:
        if dist.get_rank() == 1:
            run.runner.model.register_forward_pre_hook(lambda *_: time.sleep(2) if next(passes) > 8 else None)
        train_loop(run)


def test_a_straggler_is_seen(shards: Path, tmp_path: Path) -> None:
    """All ranks end a step together, so telemetry shows each rank's own part of it."""
    run_world(2, train_with_a_slow_rank, toy_config(shards), tmp_path)
    telemetry = Telemetry.read(tmp_path)
    assert telemetry is not None
    quick, slow = (worker.step_seconds for worker in telemetry.workers)
    assert slow > 4 and quick < 2  # what a busy machine takes for a step of a toy is not seconds
    assert telemetry.step_seconds > 4 / 5  # the mean of the last
