"""Any division into tensor, pipeline and data parallel groups trains the same model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from engine.planning.memory import WIDTH, checkpoint_bytes
from monitoring.log import read_metrics
from tests.engine.world import run_world, stored, toy_config, train


@pytest.mark.parametrize(
    ("workers", "parallel"),
    [
        (2, {}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2, "recompute": "full"}),
        (4, {"tensor": 2, "pipeline": 2}),
        (4, {"pipeline": 2}),
    ],
    ids=["dp2", "tp2", "tp2-sequence", "pp2-recompute", "tp2-pp2", "pp2-dp2"],
)
def test_layout_equals_one_process(
    workers: int, parallel: dict[str, Any], shards: Path, alone_run: Path, tmp_path: Path
) -> None:
    changes = {"parallel": {key: value for key, value in parallel.items() if key != "recompute"}}
    changes["batch"] = {"recompute": parallel.get("recompute", "none")}
    run_world(workers, train, toy_config(shards, **changes), tmp_path)
    for found, expected in zip(read_metrics(tmp_path), read_metrics(alone_run), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        by_part = found["gradient_norms"]
        assert by_part == pytest.approx(expected["gradient_norms"], rel=1e-3)  # metrics.jsonl rounds to 4 digits
        assert math.hypot(*by_part.values()) == pytest.approx(found["grad_norm"], rel=1e-3)
    weights, expected_weights = stored(tmp_path, 5), stored(alone_run, 5)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert (tensor - expected_weights[name]).abs().max() <= 1e-5, name


def test_checkpoint_has_the_planned_bytes(alone_run: Path) -> None:
    tensors = stored(alone_run, 5)
    elements = sum(tensor.numel() for name, tensor in tensors.items() if "optimizer." not in name)
    files = (alone_run / "checkpoints" / "step-00000005").glob("*.distcp")
    beside_tensors = sum(file.stat().st_size for file in files) - checkpoint_bytes(elements, WIDTH["fp32"])
    assert 0 < beside_tensors < 2048 * len(tensors), "more than a header for each tensor"
