"""Runs that branch off another run's checkpoint: the same past to the bit, and another future."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.load import dump_config
from configs.schema import RunConfig
from engine.checkpoint import describe, step_directory
from launcher.branch import _changed_past, begin_branch, check_branch, with_origin
from monitoring.log import read_events, read_metrics
from tests.engine.test_phases import values
from tests.engine.world import run_world, stored, toy_config, train

CLM = {"objective": "clm", "steps": 3, "lr": {"warmup": "1 steps"}}
MLM = {"objective": "mlm", "steps": 2, "mask_rate": 0.3, "lr": {"shape": "1-sqrt", "final": 0.1}}
LONGER = {**MLM, "steps": 4}


@pytest.fixture(scope="module")
def trunk(shards: Path, alone_run: Path) -> Path:
    (alone_run / "config.yaml").write_text(dump_config(toy_config(shards)))
    return alone_run


def branch(config: RunConfig, reference: str, directory: Path) -> RunConfig:
    """Start a branch as `detour-train --from` does, up to the first step."""
    directory.mkdir(exist_ok=True)
    config = with_origin(config, reference, directory)
    assert config.origin
    begin_branch(directory, config, config.origin, check_branch(config, config.origin))
    (directory / "config.yaml").write_text(dump_config(config))
    return config


def test_a_branch_with_the_same_recipe_is_the_undisturbed_run(shards: Path, trunk: Path, tmp_path: Path) -> None:
    config = branch(toy_config(shards), f"{trunk}@3", tmp_path / "same")
    run_world(1, train, config, tmp_path / "same")
    assert values(tmp_path / "same") == values(trunk)
    weights, expected = stored(tmp_path / "same", 5), stored(trunk, 5)
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    events = read_events(tmp_path / "same")
    assert [event["event"] for event in events][:2] == ["branched", "started"]
    assert (events[0]["run"], events[0]["step"], events[1]["step"]) == (str(trunk), 3, 3)


def test_a_longer_decay_branches_off_the_end_of_clm(shards: Path, trunk: Path, tmp_path: Path) -> None:
    """The first MLM loss is the trunk's, because the weights and the batch are; the rates are of the longer decay."""
    recipe = toy_config(shards, phases=[CLM, LONGER], name="longer")
    config = branch(recipe, f"{trunk}@3", tmp_path / "long")
    run_world(1, train, config, tmp_path / "long")
    ours, theirs = read_metrics(tmp_path / "long"), read_metrics(trunk)
    assert len(ours) == 7 and [line["step"] for line in ours] == list(range(1, 8))
    assert [line["tokens"] for line in ours[:5]] == [line["tokens"] for line in theirs]
    assert ours[3]["loss"] == theirs[3]["loss"] and ours[3]["learning_rate"] > theirs[3]["learning_rate"]
    assert describe(step_directory(tmp_path / "long" / "checkpoints", 7)).config["origin"] == {
        "run": str(trunk),
        "step": 3,
    }
    again = with_origin(recipe, str(trunk), tmp_path / "long")
    assert again == config, "the same command resumes the branch, though the trunk has a newer checkpoint"


def test_a_finished_run_is_extended(shards: Path, trunk: Path, tmp_path: Path) -> None:
    third = {"objective": "clm", "steps": 2, "sources": {"fr": 1}, "lr": {"peak": 1e-4}}
    config = branch(toy_config(shards, phases=[CLM, MLM, third]), str(trunk), tmp_path / "more")
    run_world(2, train, config, tmp_path / "more")
    lines = read_metrics(tmp_path / "more")
    assert [(line["step"], line["phase"], line["learning_rate"]) for line in lines[5:]] == [(6, 2, 1e-4), (7, 2, 1e-4)]
    data = json.loads((step_directory(tmp_path / "more" / "checkpoints", 7) / "detour.json").read_text())["data"]
    assert all(list(stream["idle"]) == ["en"] for stream in data.values())


def test_a_branch_that_has_begun_needs_no_origin(shards: Path, trunk: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(trunk)
    config = branch(toy_config(shards), f"{trunk}@3", tmp_path / "same")
    for reference in (f"{tmp_path}/link@3", f"{tmp_path}/link", f"{tmp_path}/same/../link@3"):
        assert with_origin(toy_config(shards), reference, tmp_path / "same") == config
    (tmp_path / "link").unlink()
    moved = config.origin.model_copy(update={"run": str(tmp_path / "gone")})
    (tmp_path / "same" / "config.yaml").write_text(dump_config(config.model_copy(update={"origin": moved})))
    assert with_origin(toy_config(shards), f"{tmp_path}/gone@3", tmp_path / "same").origin == moved


def test_lines_of_the_past_have_the_phases_of_the_branch(shards: Path, trunk: Path, tmp_path: Path) -> None:
    parts = [{**CLM, "steps": 2}, {"objective": "clm", "steps": 1}, MLM]
    branch(toy_config(shards, phases=parts), f"{trunk}@3", tmp_path)
    past = [{**line, "phase": phase} for line, phase in zip(read_metrics(trunk), (0, 0, 1), strict=False)]
    assert read_metrics(tmp_path) == past


def test_a_head_made_anew_is_of_the_first_step_of_its_phase(shards: Path) -> None:
    """A phase may be divided after its start, but a head made anew in the past is another past."""
    whole, divided, twice = (
        toy_config(shards, phases=[CLM, *({**MLM, "lr": {}, "steps": n, "reset": r} for n, r in parts)])
        for parts in ([(4, ["head"])], [(2, ["head"]), (2, [])], [(2, ["head"]), (2, ["head"])])
    )
    assert not list(_changed_past(whole, divided, 6))
    assert not list(_changed_past(whole, twice, 5))
    (difference,) = _changed_past(whole, twice, 6)
    assert difference.startswith("phases.2.reset")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"phases": [{**CLM, "steps": 2}, MLM]}, "phases.1.objective"),
        ({"phases": [{**CLM, "lr": {"warmup": "2 steps"}}, MLM]}, "phases.0.lr"),
        ({"phases": [{**CLM, "sources": {"en": 1.0, "fr": 0.5}}, MLM]}, "phases.0.sources"),
        ({"phases": [{**CLM, "sequence_length": 64}, MLM]}, "phases.0.sequence_length"),
        ({"phases": [CLM, MLM], "optimizer": {"lr": 1e-4}}, "phases.0.lr"),
        ({"phases": [CLM, MLM], "optimizer": {"weight_decay": 0.1}}, "optimizer.weight_decay"),
        ({"phases": [CLM, MLM], "data": {"seed": 1}}, "data.seed"),
        ({"phases": [{**CLM, "steps": 1}]}, "phases"),
    ],
)
def test_another_past_is_refused(changes: dict[str, Any], key: str, shards: Path, trunk: Path, tmp_path: Path) -> None:
    config = with_origin(toy_config(shards, **changes), f"{trunk}@3", tmp_path)
    assert config.origin
    with pytest.raises(InputError) as refusal:
        check_branch(config, config.origin)
    assert (refusal.value.key, refusal.value.code) == (key, "past-differs")


def test_a_longer_ramp_of_mask_rates_is_another_past(shards: Path) -> None:
    ramp = {**MLM, "mask_rate": [0.3, 0.1], "lr": {}}
    short, long = (toy_config(shards, phases=[CLM, {**ramp, "steps": steps}]) for steps in (4, 40))
    assert not list(_changed_past(short, long, 4)), "the first step of the ramp is the same"
    (difference,) = _changed_past(short, long, 5)
    assert difference.startswith("phases.1.mask_rate: 0.2333")


def test_a_branch_takes_longer_rows(shards: Path, trunk: Path, tmp_path: Path) -> None:
    third = {"objective": "mlm", "steps": 1, "sequence_length": 1024, "batch": {"sequences": 8}}
    config = toy_config(shards, phases=[CLM, MLM, third], model={"max_position_embeddings": 1024})
    config = with_origin(config, str(trunk), tmp_path)
    assert config.origin and check_branch(config, config.origin)


@pytest.mark.parametrize(
    ("reference", "code"),
    [("{trunk}@4", "step-not-kept"), ("{trunk}/hf", "no-such-run"), ("{output}", "from-itself")],
)
def test_a_reference_that_leads_nowhere(reference: str, code: str, shards: Path, trunk: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(toy_config(shards)))
    with pytest.raises(InputError) as refusal:
        with_origin(toy_config(shards), reference.format(trunk=trunk, output=tmp_path), tmp_path)
    assert (refusal.value.key, refusal.value.code) == ("--from", code)
