"""A phase of both objectives: any layout trains the same, it resumes to the bit, and each loss is told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import RunConfig
from monitoring.log import read_events, read_metrics
from monitoring.telemetry import Telemetry
from tests.engine.world import run_world, stored, toy_config, train

PHASES = [
    {"objective": {"mlm": 1, "clm": 1}, "steps": 4, "mask_rate": 0.3, "mask_unit": "word"},
    {"objective": "mlm", "steps": 1},
]
TRAINED = ("step", "objective", "loss", "losses", "tokens", "learning_rate", "grad_norm")


def config_of(shards: Path, **changes: Any) -> RunConfig:
    return toy_config(shards, phases=PHASES, **changes)


@pytest.fixture(scope="module")
def mixed_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixed")
    run_world(1, train, config_of(shards), directory)
    return directory


@pytest.mark.parametrize(
    ("workers", "parallel"),
    [(2, {}), (4, {"tensor": 2, "pipeline": 2, "sequence": True})],
    ids=["dp2", "tp2-pp2"],
)
def test_layout_equals_one_process(
    workers: int, parallel: dict[str, Any], shards: Path, mixed_run: Path, tmp_path: Path
) -> None:
    """Ranks have different numbers of micro-batches, and pipeline stages micro-batches of different sizes."""
    run_world(workers, train, config_of(shards, parallel=parallel), tmp_path)
    for found, expected in zip(read_metrics(tmp_path), read_metrics(mixed_run), strict=True):
        assert found["tokens"] == expected["tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert found.get("losses", {}) == pytest.approx(expected.get("losses", {}), rel=1e-5)
    weights = stored(mixed_run, 5)
    assert all((tensor - weights[name]).abs().max() <= 1e-5 for name, tensor in stored(tmp_path, 5).items())


def test_stopped_and_run_again_is_bit_identical(shards: Path, mixed_run: Path, tmp_path: Path) -> None:
    for stop_after in (2, None):
        run_world(1, train, config_of(shards), tmp_path, stop_after)
    lines, expected = ([{key: x.get(key) for key in TRAINED} for x in read_metrics(d)] for d in (tmp_path, mixed_run))
    assert lines == expected
    weights = stored(mixed_run, 5)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stored(tmp_path, 5).items())


def test_each_loss_is_told_apart(mixed_run: Path) -> None:
    lines = read_metrics(mixed_run)
    assert [line["objective"] for line in lines] == ["clm+mlm"] * 4 + ["mlm"]
    assert "losses" not in lines[-1]
    assert {name for line in lines[:4] for name in line["losses"]} == {"clm", "mlm"}
    for line in lines[:4]:
        assert min(line["losses"].values()) <= line["loss"] <= max(line["losses"].values())
    now = Telemetry.read(mixed_run)
    assert now is not None
    assert now.loss.keys() == {"clm", "mlm", "clm+mlm"} and now.counters.tokens.keys() == {"clm", "mlm"}
    assert sum(now.counters.tokens.values()) == lines[-1]["tokens"]
    begun = [event["objective"] for event in read_events(mixed_run) if event["event"] == "phase_started"]
    assert begun == ["clm+mlm", "mlm"]
