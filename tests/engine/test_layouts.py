"""Any division into tensor, pipeline and data parallel groups trains the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from datapipe.prepare import ensure_prepared
from datapipe.tokenizer import load_tokenizer
from engine.checkpoint import describe, latest_valid, read_tensors
from engine.modernbert.convert import parameters
from monitoring.log import read_metrics
from tests.engine.world import run_world, toy_config, train
from transformers import ModernBertConfig


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    config = toy_config(folder)
    ensure_prepared(config.data, load_tokenizer(config.tokenizer))
    return folder


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    newest, damaged = latest_valid(directory / "checkpoints")
    assert newest is not None and not damaged
    architecture = ModernBertConfig(**describe(newest)["architecture"])
    return read_tensors(newest, [ours for _, ours, _ in parameters(architecture)])


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(directory)]


@pytest.fixture(scope="session")
def alone_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone")
    run_world(1, train, toy_config(shards), directory)
    assert len(losses(directory)) == 5
    return directory


@pytest.mark.parametrize(
    ("workers", "parallel"),
    [
        (2, {}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2}),
        (4, {"tensor": 2, "pipeline": 2}),
    ],
    ids=["dp2", "tp2", "tp2-sequence", "pp2", "tp2-pp2"],
)
def test_layout_equals_one_process(
    workers: int, parallel: dict[str, Any], shards: Path, alone_run: Path, tmp_path: Path
) -> None:
    run_world(workers, train, toy_config(shards, parallel=parallel), tmp_path)
    for found, expected in zip(losses(tmp_path), losses(alone_run), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    expected_weights = final_weights(alone_run)
    for name, tensor in final_weights(tmp_path).items():
        assert (tensor - expected_weights[name]).abs().max() <= 1e-5, name
