"""Phases with data, batches, lengths, learning rates and rotary bases of their own, in one exact run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from engine.checkpoint import describe, step_directory
from monitoring.log import read_metrics
from tests.engine.world import run_world, stored, toy_config, train

PHASES: list[dict[str, Any]] = [
    {"objective": "clm", "steps": 3, "sources": {"en": 1}, "lr": {"warmup": "1 steps"}},
    {
        "objective": "clm",
        "steps": 2,
        "sequence_length": 256,
        "global_rope_theta": 640_000,
        "batch": {"sequences": 4, "micro": 1},
        "lr": {"peak": 1e-4},
    },
    {
        "objective": "mlm",
        "steps": 3,
        "sources": {"fr": 0.3},
        "sequence_length": 64,
        "mask_rate": [0.4, 0.1],
        "lr": {"peak": 3e-4, "shape": "1-sqrt", "final": 0.1},
    },
]


def config_of(shards: Path, **changes: Any) -> RunConfig:
    evaluation = {"shards": str(shards / "fr"), "every": "2 steps", "sequences": 4}
    return toy_config(shards, **{"phases": PHASES, "data": {"evaluation": evaluation}, **changes})


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("phases")
    run_world(1, train, config_of(shards), directory)
    return directory


def values(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in line.items() if not any(c in k for c in clock)} for line in read_metrics(directory)]


def test_every_phase_has_its_own_settings(shards: Path, undisturbed: Path) -> None:
    lines = read_metrics(undisturbed)
    assert [line["phase"] for line in lines] == [0, 0, 0, 1, 1, 2, 2, 2]
    rates = [line["learning_rate"] for line in lines]
    assert rates[:5] == [2e-4] * 3 + [1e-4] * 2 and rates[7] == pytest.approx(3e-5)
    tokens = [after["tokens"] - before["tokens"] for before, after in zip([{"tokens": 0}, *lines], lines, strict=False)]
    slots = [8 * 128] * 3 + [4 * 256] * 2 + [8 * 64] * 3
    assert all(0.5 * most < real <= most for real, most in zip(tokens, slots, strict=True))
    state = {step: describe(step_directory(undisturbed / "checkpoints", step)) for step in (3, 5, 8)}
    thetas = {step: meta.architecture["rope_parameters"]["full_attention"] for step, meta in state.items()}
    assert [theta["rope_theta"] for theta in thetas.values()] == [160_000, 640_000, 640_000]
    streams = {step: meta.data["0"] for step, meta in state.items() if meta.data}
    assert list(streams[3]["sources"]) == ["en"] and list(streams[5]["sources"]) == ["en", "fr"]
    assert streams[8]["idle"]["en"]["cursor"] == streams[5]["sources"]["en"], "an idle source keeps its place"
    assert streams[8]["idle"]["en"]["pieces"], "text that was drawn waits for the source's return"


@pytest.mark.parametrize("stop", [6])
def test_stopped_anywhere_it_continues_to_the_bit(stop: int, shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = config_of(shards)
    run_world(1, train, config, tmp_path, stop)
    run_world(1, train, config, tmp_path)
    assert values(tmp_path) == values(undisturbed)
    weights, expected = stored(tmp_path, 8), stored(undisturbed, 8)
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    last = [
        json.loads((step_directory(run / "checkpoints", 8) / "detour.json").read_text())["data"]
        for run in (tmp_path, undisturbed)
    ]
    assert last[0] == last[1]


def test_the_rotary_base_of_a_damaged_checkpoint_is_not_taken(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The first phase has the model's own base again, where the run goes back to it from a later phase."""
    config = config_of(shards, checkpoint={"every": "1 steps", "keep": 9})
    run_world(1, train, config, tmp_path, 4)
    for step in (3, 4):
        victim = next(step_directory(tmp_path / "checkpoints", step).glob("*.distcp"))
        victim.write_bytes(victim.read_bytes()[:-1])
    run_world(1, train, config, tmp_path)
    assert values(tmp_path) == values(undisturbed)


def test_other_numbers_of_ranks_over_the_borders(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = config_of(shards, batch={"micro": 1})
    for ranks, stop in ((4, 2), (2, 2), (1, 2), (2, None)):
        run_world(ranks, train, config, tmp_path, stop)
    for found, expected in zip(read_metrics(tmp_path), read_metrics(undisturbed), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found.get("eval_loss", {}) == pytest.approx(expected.get("eval_loss", {}), rel=1e-5)
    weights, expected_weights = stored(tmp_path, 8), stored(undisturbed, 8)
    assert all((weights[name] - tensor).abs().max() <= 1e-5 for name, tensor in expected_weights.items())
