from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import InputError, RunFailedError
from configs.schema import RunConfig
from datapipe.prepare import prepare
from datapipe.tokenizer import load_tokenizer
from monitoring.log import read_events
from studies.plan import expand, load_study
from studies.study import run_study
from tests.launcher.toy import recipe
from tests.toy_recipe import TOKENIZER

Write = Callable[[str, str], Path]
ROOT = Path(__file__).parents[2]


class OneProcess:
    """A cluster that calls the real trainer in this process, without Ray."""

    def room(self, config: RunConfig) -> int:
        return 1

    def train(self, config: RunConfig, directory: Path) -> bool:
        from configs.load import dump_config
        from engine.megatron import cpu

        cpu.install()
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state

        from engine.trainer import train

        torch.set_num_threads(1)  # as workers do, because sums in another order differ in the last digits
        directory.mkdir(parents=True, exist_ok=True)
        if config.origin and not (directory / "checkpoints").exists():
            from launcher.branch import begin_branch, check_branch

            begin_branch(directory, config, config.origin, check_branch(config, config.origin))
        (directory / "config.yaml").write_text(dump_config(config))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            return train(config, directory, lambda: None).finished
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    def fine_tune(self, function: Any, jobs: Any) -> Any:
        return map(function, jobs)

    def stop(self) -> None:
        pass


def held_out(toy_shards: Path) -> Path:
    """Return shards of the French sample corpus, which no toy run trains on."""
    shards = toy_shards.parent / "held-out"
    if not shards.exists():
        prepare(["package://corpus/tico19_fr.jsonl.gz"], load_tokenizer(TOKENIZER), shards)
    return shards


def study(write: Write, toy_shards: Path, **changes: Any) -> Path:
    """Write a study of twelve trials of three steps: two arms, three data orders, two learning rates."""
    phases = [{"objective": "clm", "steps": 2}, {"objective": "mlm", "steps": 1}]
    model = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tree = recipe(toy_shards, phases=phases, model=model, data={"sequence_length": 32, "streams": 2})
    tree |= {"batch": {"sequences": 2, "micro": 2}, "checkpoint": {"every": "2 steps"}}
    tree["data"]["evaluation"] = {"shards": str(held_out(toy_shards)), "sequences": 4}
    write("toy.yaml", yaml.safe_dump(tree))
    settings = {
        "name": "toy-study",
        "recipe": "toy.yaml",
        "grid": {"data.seed": [1, 2, 3], "optimizer.lr": [0.001, 0.002]},
        "arms": {"mlm": {"phases.0.objective": "mlm"}, "detour": {}},
    }
    return write("study.yaml", yaml.safe_dump({**settings, **changes}))


def run(path: Path, output: Path) -> None:
    loaded, folder = load_study(str(path))
    assert run_study(loaded, folder, output, OneProcess())


def determined(output: Path) -> dict[str, str]:
    """Read the part of a study's report that the seeds determine."""
    files = {name: (output / name).read_text() for name in ("trials.csv", "comparison.json", "scaling.json")}
    page, speeds = re.subn(r'<section id="speed">.*</section>', "", (output / "report.html").read_text(), flags=re.S)
    assert speeds == 1
    return {**files, "report.html": page}


@pytest.mark.chaos
def test_killed_at_a_random_moment_it_ends_with_the_same_report(
    write: Write,
    toy_shards: Path,
    tmp_path: Path,
    drawn_seed: int,
) -> None:
    path = study(write, toy_shards, baseline="mlm")
    run(path, tmp_path / "undisturbed")
    command = (
        f"from pathlib import Path; from tests.studies.test_study import run; run(Path({str(path)!r}), Path('out'))"
    )
    draw = random.Random(drawn_seed)
    records_before_kill = draw.randrange(1, 11)
    with subprocess.Popen(
        [sys.executable, "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        while len(list((tmp_path / "out" / "records").glob("[!.]*"))) < records_before_kill and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1))
        process.kill()
    records = {record: record.stat().st_mtime_ns for record in (tmp_path / "out" / "records").glob("[!.]*")}
    assert 1 <= len(records) <= 12
    run(path, tmp_path / "out")
    assert determined(tmp_path / "out") == determined(tmp_path / "undisturbed")
    assert all(record.stat().st_mtime_ns == before for record, before in records.items()), (
        "finished trials were repeated"
    )
    events = [read_events(trial) for trial in sorted((tmp_path / "out" / "trials").iterdir())]
    assert len(events) == 12
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    found = [(row["arm"], row["measure"], len(row["pairs"])) for row in comparison]
    assert found == [("detour", "loss", 3)] * 2, "learning rates are compared apart, over data orders"
    verdicts = ("no difference shown", "detour is better than mlm", "detour is worse than mlm")
    assert all(row["verdict"] in verdicts for row in comparison)


@pytest.mark.chaos
def test_trained_models_are_evaluated(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    from tests.studies.test_evaluate import ner

    class Exporting(OneProcess):
        def train(self, config: RunConfig, directory: Path) -> bool:
            from datapipe.tokenizer import load_tokenizer
            from engine.checkpoint import list_checkpoints
            from engine.export import export_hf

            finished = super().train(config, directory)
            newest = list_checkpoints(directory / "checkpoints")[0]
            export_hf(newest, directory / "hf", load_tokenizer(config.tokenizer))
            return finished

    tasks = [{"task": ner(write), "seeds": [1], "protocol": {"epochs": 1, "lr": 0.01}}]
    path = study(write, toy_shards, grid={"data.seed": [1, 2]}, evaluate=tasks)
    loaded, folder = load_study(str(path))
    assert run_study(loaded, folder, tmp_path / "out", Exporting())
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["measure"] for row in rows] == ["loss", "toy-ner"]


def test_a_failed_trial_leaves_the_others(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    class Failing(OneProcess):
        def train(self, config: RunConfig, directory: Path) -> bool:
            if "seed-2" in directory.name:
                raise RunFailedError("a worker died")
            return super().train(config, directory)

    path = study(write, toy_shards, grid={"data.seed": [1, 2]}, arms={})
    loaded, folder = load_study(str(path))
    with pytest.raises(RunFailedError, match=r"1 of 2 .*data.seed-2 \(a worker died\)"):
        run_study(loaded, folder, tmp_path / "out", Failing())
    assert [record.stem.rpartition("-")[0] for record in (tmp_path / "out" / "records").iterdir()] == ["data.seed-1"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"grid": {"optimizer.betta": [[0.9, 0.9]]}}, ["optimizer.betta", "'betas'"]),
        ({"grids": {}}, ["grids", "'grid'"]),
        ({"arms": {"a": {"phases.0.freeze": [5]}}}, ["phases.0.freeze", "[5]"]),
        ({"recipe": "nowhere.yaml"}, ["nowhere.yaml"]),
    ],
)
def test_bad_recipes_are_refused_before_anything_starts(
    write: Write, toy_shards: Path, changes: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        run(study(write, toy_shards, **changes), tmp_path / "out")
    assert all(name in str(error.value) for name in named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "key", "named"),
    [
        ({"grid": {"data.seed": [1, 1]}}, "grid", ["detour-data.seed-1, mlm-data.seed-1"]),
        ({"grid": {"data.seed": []}}, "grid.data.seed", []),
        ({"grid": {"data.seed": [1, 2], "seed": [3, 4]}}, "grid.seed", ["independent", "data.seed alone"]),
        ({"arms": {"a": {}, "b": {"phases.0.steps": 3}}}, "arms", ["'a'", "'b'", "total steps: 3 -> 4"]),
        ({"arms": {"a": {}, "b": {"data.seed": 7}}, "grid": {}}, "arms", ["data.seed: 42 -> 7"]),
        ({"arms": {"a": {}, "b": {"model.hidden_size": 32}}}, "arms", ["model.hidden_size: 16 -> 32"]),
        ({"arms": {"a": {}}, "baseline": "c"}, "baseline", ["'c'", "a"]),
        ({"arms": {"a": {}, "b": {"phases.0.objective": "clm"}}}, "arms", ["compute the same"]),
        ({"arms": {"a": {"decay_share": 1.5}}}, "decay_share", ["1.5"]),
        ({"grid": {"parameters": ["1k"]}, "arms": {}}, "parameters", ["parameters-1k", "1k"]),
    ],
)
def test_bad_studies_are_refused_before_anything_starts(
    write: Write, toy_shards: Path, changes: dict[str, Any], key: str, named: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        run(study(write, toy_shards, **changes), tmp_path / "out")
    assert error.value.key == key
    assert all(name in str(error.value) for name in named)
    assert not (tmp_path / "out").exists()


def test_another_study_keeps_its_directory(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.yaml").write_text("name: other\n")
    with pytest.raises(InputError, match=r"study\.yaml") as error:
        run(study(write, toy_shards), tmp_path / "out")
    assert (error.value.key, error.value.code) == ("--output", "another-study")
    assert (tmp_path / "out" / "study.yaml").read_text() == "name: other\n"


def test_a_reworded_study_continues(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"grid": {"data.seed": [1]}, "arms": {}}
    run(study(write, toy_shards, about="As it was.", **settings), tmp_path / "out")
    [record] = (tmp_path / "out" / "records").iterdir()
    before = record.stat().st_mtime_ns
    run(study(write, toy_shards, about="As it is said now.", **settings), tmp_path / "out")
    assert record.stat().st_mtime_ns == before


def test_a_study_grows(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    """Another seed, another arm and another name for the same setting train only what is new."""

    class Counting(OneProcess):
        def train(self, config: RunConfig, directory: Path) -> bool:
            trained.append(directory.name.rpartition("-")[0])
            return super().train(config, directory)

    trained: list[str] = []

    def grow(**settings: Any) -> None:
        loaded, folder = load_study(str(study(write, toy_shards, **settings)))
        assert run_study(loaded, folder, tmp_path / "out", Counting())

    grow(grid={"data.seed": [1]}, arms={"detour": {}})
    grow(grid={"data.seed": [1, 2]}, arms={"detour": {}})
    assert trained == ["detour-data.seed-1", "detour-data.seed-2"]
    grow(grid={"data.seed": [1]}, arms={"clm": {"phases.0.objective": "clm"}})
    assert len(trained) == 2, "another name for the same run"
    [row] = csv.DictReader((tmp_path / "out" / "trials.csv").open())
    assert row["trial"] == "clm-data.seed-1"


def test_trials_that_share_a_trunk_train_it_once(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    """Decays of two lengths branch off one CLM end, with the records of whole runs."""

    class Counting(OneProcess):
        def train(self, config: RunConfig, directory: Path) -> bool:
            trained.append((directory.name.rpartition("-")[0], config.origin.step if config.origin else 0))
            return super().train(config, directory)

    trained: list[tuple[str, int]] = []
    grid = {"phases.1.steps": [1, 2]}
    loaded, folder = load_study(str(study(write, toy_shards, grid=grid, arms={})))
    assert run_study(loaded, folder, tmp_path / "out", Counting())
    assert trained == [("trunk", 0), ("phases.1.steps-1", 2), ("phases.1.steps-2", 2)]
    for length in (1, 2):
        alone, _ = load_study(str(study(write, toy_shards, grid={"phases.1.steps": [length]}, arms={})))
        assert run_study(alone, folder, tmp_path / f"alone-{length}", OneProcess())
    rows, whole = (
        [row for path in paths for row in csv.DictReader((path / "trials.csv").open())]
        for paths in ([tmp_path / "out"], [tmp_path / "alone-1", tmp_path / "alone-2"])
    )
    assert [(row["trial"], row["loss"], row["tokens"]) for row in rows] == [
        (row["trial"], row["loss"], row["tokens"]) for row in whole
    ]


def test_addresses_are_of_content(write: Write, toy_shards: Path) -> None:
    def addresses(*overrides: str, **settings: Any) -> list[str]:
        loaded, folder = load_study(str(study(write, toy_shards, **settings)), None, overrides)
        return [trial.address for trial in expand(loaded, folder)]

    one = addresses(grid={"data.seed": [1]}, arms={})
    assert addresses("data.seed=[1]", "cluster.workers_per_node=2", grid={"data.seed": [7]}, arms={}) == one
    assert addresses(grid={}, arms={"other": {}}, common={"data.seed": 1}) == one
    assert addresses("phases.0.steps=3", grid={"data.seed": [1]}, arms={}) != one
    workers = addresses(grid={"cluster.workers_per_node": [1, 2]}, arms={})
    assert len(set(workers)) == 2, "what a study varies is never taken for the same"
    assert addresses("data.sources.0.shards=elsewhere", grid={"data.seed": [1]}, arms={}) != one


@pytest.mark.parametrize(
    ("override", "seeds", "arms"),
    [
        ("data.seed=42", [42], ["mlm", "detour"]),
        ("grid.data.seed=[7, 8]", [7, 8], ["mlm", "detour"]),
        ("arms.mlm=null", [1], ["detour"]),
        ("arms.low.phases.0.freeze=[0]", [1], ["mlm", "detour", "low"]),
        ("batch.sequences=4", [1], ["mlm", "detour"]),
    ],
)
def test_any_key_is_overridden(
    write: Write, toy_shards: Path, override: str, seeds: list[int], arms: list[str]
) -> None:
    path = study(write, toy_shards, grid={"data.seed": [1]})
    loaded, folder = load_study(str(path), None, [override])
    assert {trial.config.data.seed for trial in expand(loaded, folder)} == set(seeds)
    assert set(loaded.arms) == set(arms)


def test_overrides_of_tasks_and_lengths(write: Write, toy_shards: Path) -> None:
    tasks = [{"task": "gad"}, {"task": "hoc"}]
    path = study(write, toy_shards, grid={"phases.0.tokens": ["1k"]}, arms={}, evaluate=tasks)
    loaded, folder = load_study(str(path), None, ["evaluate.1.seeds=[3]", "evaluate.0.protocol.epochs=2"])
    assert (loaded.evaluate[1].seeds, loaded.evaluate[0].protocol) == ((3,), {"epochs": 2})
    assert expand(loaded, folder)[0].config.phases[0].steps is None, "tokens replace the recipe's steps"
    shipped, _ = load_study("twin", None, ["rule.margin=0.02", "held_out.text=mine"])
    assert shipped.rule is not None and shipped.held_out is not None
    assert (shipped.rule.margin, shipped.held_out["text"]) == (0.02, "mine")
    assert load_study("twin", None, ["rule=null"])[0].rule is None


def test_an_override_that_changes_nothing_is_refused(write: Write, toy_shards: Path) -> None:
    path = study(write, toy_shards, arms={"a": {"phases.0.objective": "mlm"}, "b": {"phases.0.objective": "clm"}})
    with pytest.raises(InputError) as error:
        load_study(str(path), None, ["phases.0.objective=clm"])
    assert (error.value.key, error.value.code) == ("phases.0.objective", "without-effect")


def test_a_task_with_two_settings_is_two_measures(write: Write) -> None:
    from studies.measures import measures_of
    from studies.tasks import EvaluatedTask
    from tests.studies.test_evaluate import ner

    task = ner(write)
    two = [EvaluatedTask(task=task), EvaluatedTask(task=task, protocol={"examples": 8})]
    labels = [measure.label for measure in measures_of(two)]
    assert labels == ["toy-ner (as described)", "toy-ner (examples 8)"]
    with pytest.raises(InputError) as error:
        measures_of([two[0], two[0]])
    assert error.value.key == "evaluate"


def test_derived_keys(write: Write, toy_shards: Path) -> None:
    arms = {"low": {"frozen_share": [0, 0.36]}, "mid": {"frozen_share": [0.36, 0.68]}}
    common = {"model.num_hidden_layers": 22, "phases.0.steps": 10, "phases.1.steps": 1, "decay_share": 0.25}
    loaded, folder = load_study(str(study(write, toy_shards, arms=arms, grid={}, common=common)))
    low, mid = (trial.config.phases for trial in expand(loaded, folder))
    assert low[0].freeze == tuple(range(8))
    assert mid[0].freeze == tuple(range(8, 15)), "the layers of arXiv 2605.12438"
    assert [phase.steps for phase in low] == [8, 3]


@pytest.mark.parametrize("name", ["twin", "freeze-low", "freeze-mid", "freeze-low-decay", "decay-length", "forgetting"])
def test_shipped_comparisons_suit_every_recipe_of_two_phases(name: str) -> None:
    lengths = ["decay_ratio=[1, 2]"] if name == "decay-length" else []
    loaded, folder = load_study(name, "demo", ["data.seed=[42]", *lengths])
    trials = expand(loaded, folder)
    assert len(trials) == len(loaded.arms) * math.prod(map(len, loaded.grid.values()))
    assert all(trial.config.spans[-1].steps >= 80 for trial in trials), "the floor of the decay, in updates"


@pytest.mark.chaos
def test_two_trials_by_the_command_line(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    """Run a study through the launcher and Ray; after a SIGTERM the same command continues it."""
    from tests.launcher.toy import DETOUR, environment

    path = study(write, toy_shards, grid={"data.seed": [1]})
    command = [*DETOUR, "study", str(path), "--output", "out", "cluster.workers_per_node=1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    trial = tmp_path / "out" / "trials"
    deadline = time.monotonic() + 200
    while not list(trial.glob("*/metrics.jsonl")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode in (75, 0), said
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert rows[0]["verdict"].startswith("no verdict")
    for directory in trial.glob("*/"):
        assert (directory / "hf" / "config.json").is_file()
