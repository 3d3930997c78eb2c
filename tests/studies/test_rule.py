"""The decision rule, the checks before the first step, room on the disk, and toys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from configs.errors import InputError
from configs.load import shipped
from studies.checks import require_text
from studies.comparison import slopes
from studies.decision import decide, spread_of
from studies.measures import measures_of, outcomes_of
from studies.notes import look_at_spread
from studies.plan import SHIPPED, Study, expand, is_seed, load_study, trunks_of
from studies.records import read_record, record_path
from studies.report import write_report
from studies.room import require_room, thin
from studies.rule import Rule, power
from studies.study import _parts, run_study
from studies.tables import finite
from studies.tasks import EvaluatedTask
from studies.toy import toy_study
from tests.studies.test_report import record
from tests.studies.test_study import OneProcess, study

Write = Callable[[str, str], Path]
RULE = Rule(outcomes=("probe", "fine-tuned"))


def pairs(probe: list[float], tuned: list[float], loss: float = 0.02) -> list[dict[str, Any]]:
    """Make records of two arms whose outcomes differ by the given amounts."""
    made = []
    for seed, gains in enumerate(zip(probe, tuned, strict=True)):
        for arm, changes, more in (("mlm", (0.0, 0.0), 0.0), ("detour", gains, loss)):
            scores = {"probe": [0.6 + seed / 10 + changes[0]], "fine-tuned": [0.5 + seed / 9 + changes[1]]}
            point = {"data.seed": seed}
            made.append(record(f"{arm}-{seed}", 2.0 + seed + more, arm=arm, point=point, scores=scores))
    return made


SMALL, NULL = [0.020, 0.021, 0.019, 0.022, 0.018, 0.020], [0.001, -0.002, 0.000, 0.002, -0.001, 0.001]
WIDE = [0.03, -0.02, 0.04, -0.03, 0.02, 0.01]


def test_the_rule_decides() -> None:
    helps, null = decide(pairs(SMALL, NULL), RULE, "mlm")
    assert (helps.verdict, null.verdict) == ("helps here", "no gain of 1 point here")
    assert (helps.outcome, len(helps.pairs)) == ("probe", 6)
    assert helps.loss.mean == pytest.approx(0.02)
    assert helps.p is not None and null.p is not None and helps.p < 0.05 < null.p
    assert [entry.verdict for entry in decide(pairs(WIDE, WIDE), RULE, "mlm")] == ["undecided"] * 2
    assert all(entry.verdict.startswith("not read") for entry in decide(pairs(SMALL, NULL, 0.3), RULE, "mlm"))
    assert decide(pairs([0.1], [0.1]), RULE, "mlm")[0].verdict == "undecided", "one pair shows no spread"


def at(records: list[dict[str, Any]], **point: Any) -> list[dict[str, Any]]:
    """Put records at a setting of the grid; `decay_ratio` is the length of the decay."""
    decay = {key: value for key, value in point.items() if key == "decay_ratio"}
    return [{**row, "point": {**row["point"], **point}, "decay": decay} for row in records]


def test_the_first_decay_that_passes_is_read_and_the_others_are_described() -> None:
    """Holm's method counts the two tests that are read; sizes are read each, so they count."""
    lengths = (
        at(pairs(SMALL, NULL, loss), decay_ratio=ratio) for ratio, loss in ((0.07, 0.3), (0.1, 0.02), (0.2, 0.0))
    )
    decided = decide([row for rows in lengths for row in rows], RULE, "mlm")
    assert [entry.read for entry in decided] == [False, False, True, True, False, False]
    assert decided[0].verdict.startswith("not read: the held-out MLM loss")
    assert [entry.verdict for entry in decided[2:4]] == ["helps here", "no gain of 1 point here"]
    assert decided[4].verdict == "described only: decay_ratio 0.1 is read"
    assert [entry.p for entry in decided if not entry.read] == [None] * 4
    alone = decide(pairs(SMALL, NULL), RULE, "mlm")
    assert [entry.p for entry in decided[2:4]] == [entry.p for entry in alone]
    sizes = [row for size in (16, 32) for row in at(pairs(SMALL, NULL), parameters=size)]
    both = decide(sizes, RULE, "mlm")
    assert all(entry.read for entry in both)
    assert both[0].p is not None and alone[0].p is not None and both[0].p == pytest.approx(2 * alone[0].p)


def test_each_arm_has_its_own_decay(tmp_path: Path) -> None:
    def renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "arm": "frozen"} for row in rows if row["arm"] == "detour"]

    records = []
    for ratio, loss, of_frozen in ((0.07, 0.3, 0.02), (0.1, 0.02, 0.02)):
        records += at(pairs(WIDE, NULL, loss) + renamed(pairs(NULL, NULL, of_frozen)), decay_ratio=ratio)
    decided = decide(records, RULE, "mlm")
    read = {(entry.arm, entry.at["decay_ratio"]) for entry in decided if entry.read}
    assert read == {("frozen", 0.07), ("detour", 0.1)}
    assert spread_of(records, RULE, "mlm") == pytest.approx(np.std(WIDE, ddof=1))
    arms: dict[str, dict[str, Any]] = {"mlm": {}, "detour": {}, "frozen": {}}
    page = write_report(Study(name="s", recipe="demo", arms=arms, rule=RULE), records, tmp_path).read_text()
    assert "corrected for the 4 tests that are read" in page
    assert "2 outcomes x 2 arms" in page
    assert page.count('<tr style="font-weight: 600">') == 4


@pytest.mark.parametrize("name", [name for name in shipped(SHIPPED) if load_study(name)[0].rule])
def test_shipped_studies_that_decide_have_power(name: str) -> None:
    """One point is found in over 80 % of studies at the spread that the rule assumes, after all corrections."""
    loaded, _ = load_study(name)
    assert loaded.rule is not None
    decays = {"decay_ratio", "decay_share", "decay_floor"}
    sizes = math.prod(len(values) for key, values in loaded.grid.items() if key not in decays and not is_seed(key))
    tests = len(loaded.rule.outcomes) * (len(loaded.arms) - 1) * sizes
    assert loaded.rule.margin == 0.01
    assert power(len(loaded.grid["data.seed"]), loaded.rule.spread, loaded.rule.margin, tests) >= 0.8


def test_outcomes_are_corrected() -> None:
    """An effect that is found alone at 5 % is not found beside a second outcome that shows nothing."""
    weak = [0.004, 0.012, 0.003, 0.011, -0.002, 0.008]
    [alone] = decide(pairs(weak, NULL), Rule(outcomes=("probe",)), "mlm")
    beside = decide(pairs(weak, NULL), RULE, "mlm")[0]
    assert alone.p is not None and beside.p is not None and alone.p < 0.05 < beside.p == pytest.approx(2 * alone.p)
    assert (alone.verdict, beside.verdict) == ("helps here", "undecided")


def test_the_look_sees_the_spread_and_not_the_sign(tmp_path: Path) -> None:
    assert spread_of(pairs(WIDE, NULL), RULE, "mlm") == pytest.approx(np.std(WIDE, ddof=1))
    assert spread_of(pairs([-gain for gain in WIDE], NULL), RULE, "mlm") == pytest.approx(np.std(WIDE, ddof=1))
    planned = Study(name="s", recipe="demo", arms={"mlm": {}, "detour": {}}, rule=Rule(look_after=3))
    stops, sentence = look_at_spread(planned, pairs(WIDE, NULL), tmp_path)
    assert stops and "stops here" in sentence
    assert look_at_spread(planned, pairs(NULL, NULL), tmp_path) == (stops, sentence), "one look, kept"
    (tmp_path / "other").mkdir()
    assert not look_at_spread(planned, pairs(NULL, NULL), tmp_path / "other")[0]


@pytest.mark.parametrize(("orders", "spread", "outcomes", "measured"), [(5, 0.5, 1, 0.91), (5, 0.75, 1, 0.619)])
def test_power_is_that_of_simulated_studies(orders: int, spread: float, outcomes: int, measured: float) -> None:
    """The measured rates are those of benchmarks/results/statistics-2026-11-27.md."""
    assert power(orders, spread, 1.0, outcomes) == pytest.approx(measured, abs=0.01)
    assert power(orders, spread, 1.0, outcomes + 1) < measured


def test_the_plan_warns_of_low_power() -> None:
    assert "orders would have it" in RULE.sentences(3)[-1]
    assert "orders would have it" not in RULE.sentences(8)[-1], "the shipped comparisons have eight"
    assert "one order" in RULE.sentences(1)[-1]


def test_the_page_has_rule_decision_and_origin(tmp_path: Path) -> None:
    arms: dict[str, dict[str, Any]] = {"mlm": {}, "detour": {}}
    made = {"software": {"commit": "c0ffee", "torch": "2.9"}, "hardware": "2 cores of a test", "hours": 0.5}
    records = [{**row, "made": made} for row in pairs(SMALL, NULL)]
    measured = [{"measure": "ner", "metric": "entity_f1", "split": "test", "examples": "80", "seeds": "17, 18"}]
    planned = Study(name="s", recipe="demo", arms=arms, rule=RULE, toy=True)
    page = write_report(planned, records, tmp_path, (), measured).read_text()
    for said in ("A toy.", "no gain of 1 point here", "helps here", "c0ffee", "2 cores of a test", "17, 18", "Power:"):
        assert said in page
    for name in ("decision", "comparison", "measures", "made", "trials"):
        for suffix in ("csv", "md", "tex"):
            assert (tmp_path / f"{name}.{suffix}").stat().st_size
    assert "within 0.1" in (tmp_path / "losses.md").read_text()
    assert (tmp_path / "scores.csv").read_text().count("\n") == 1 + 3 * len(records)


def test_no_held_out_text_is_refused(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    path = study(write, toy_shards, grid={"data.seed": [1]}, common={"data.evaluation": None})
    loaded, folder = load_study(str(path))
    with pytest.raises(InputError) as error:
        run_study(loaded, folder, tmp_path / "out", OneProcess())
    assert (error.value.key, error.value.code) == ("data.evaluation", "no-held-out-text")
    trained = loaded.model_copy(update={"common": {"data.evaluation": {"shards": str(toy_shards)}}})
    with pytest.raises(InputError) as error:
        run_study(trained, folder, tmp_path / "out", OneProcess())
    assert error.value.code == "held-out-is-trained-on"
    assert not (tmp_path / "out").exists()


def test_held_out_text_of_the_study_fills_a_gap_only(write: Write, toy_shards: Path) -> None:
    path = study(write, toy_shards, grid={}, arms={}, held_out={"shards": "ours", "text": "ours.txt"})
    assert expand(*load_study(str(path)))[0].config.data.evaluation.shards != "ours"  # type: ignore[union-attr]
    tree = yaml.safe_load((path.parent / "toy.yaml").read_text())
    del tree["data"]["evaluation"]
    write("toy.yaml", yaml.safe_dump(tree))
    [trial] = expand(*load_study(str(path)))
    assert trial.config.data.evaluation is not None and trial.config.data.evaluation.shards == "ours"
    with pytest.raises(InputError, match=r"ours\.txt"):
        require_text([trial])


def test_an_outcome_that_nothing_measures_is_refused(write: Write, toy_shards: Path) -> None:
    path = study(write, toy_shards, rule={"outcomes": ["probe"]}, evaluate=[{"task": "bc5cdr"}])
    with pytest.raises(InputError) as error:
        expand(*load_study(str(path)))
    assert error.value.code == "outcome-not-measured"


def test_a_task_as_outcome_is_its_fine_tuned_measure(write: Write, toy_shards: Path) -> None:
    """Scores of probes and of fine-tunings are never averaged, nor those of one task with two protocols."""
    for name in ("train", "dev", "test"):
        write(f"{name}.tsv", f"{name}\tB-X\n\nb\tO\n")
    files = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    task = {"name": "other", "kind": "tokens", "score": "entity_f1", "files": files, "protocol": {"preset": "english"}}
    entry: dict[str, Any] = {"task": str(write("t.yaml", yaml.safe_dump(task))), "by": ("probe", "fine-tuned")}
    measures = measures_of([EvaluatedTask(**entry)])
    scores = {"other": [0.9], "other, probe": [0.5]}
    assert outcomes_of(measures, scores, ["t", "probe"]) == {"t": 0.9, "probe": 0.5}
    assert outcomes_of(measures[:1], scores, ["t"]) == {"t": 0.5}, "probed only"
    twice = [entry, {**entry, "protocol": {"epochs": 3}}]
    path = study(write, toy_shards, rule={"outcomes": ["t"]}, evaluate=[{**e, "by": list(e["by"])} for e in twice])
    with pytest.raises(InputError) as error:
        expand(*load_study(str(path)))
    assert (error.value.key, error.value.code) == ("rule.outcomes", "outcome-ambiguous")


@pytest.mark.parametrize(
    ("changes", "override", "key"),
    [
        ({"arms": ["mlm", "detour"]}, "arms.mlm.seed=3", "arms"),
        ({"arms": {"mlm": "mlm"}}, "arms.mlm.seed=3", "arms.mlm"),
        ({"grid": ["data.seed"]}, "data.seed=[1]", "grid"),
        ({"grid": {"data.seed": 42}}, "seed=3", "grid"),
        ({"rule": True}, "rule.margin=0.02", "rule"),
        ({"common": ["x"]}, "seed=3", "common"),
        ({"evaluate": ["bc5cdr"]}, "evaluate.0.seeds=[1]", "evaluate"),
        ({"evaluate": [{"task": "bc5cdr", "protocol": "x"}]}, "evaluate.0.protocol.epochs=1", "protocol"),
    ],
)
def test_overrides_of_a_wrong_section_are_refused(
    write: Write, toy_shards: Path, changes: dict[str, Any], override: str, key: str
) -> None:
    path = study(write, toy_shards, **changes)
    with pytest.raises(InputError) as error:
        load_study(str(path), None, [override])
    assert error.value.key == key


def test_a_loss_that_is_not_finite_is_recorded_in_strict_json(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    loaded, folder = load_study(str(study(write, toy_shards, grid={}, arms={})))
    [trial] = expand(loaded, folder)
    path = record_path(tmp_path, trial)
    path.parent.mkdir()
    made = record("t", math.nan, speed={"workers": 1, "tokens_per_second": 1.0, "mfu": math.nan})
    path.write_text(json.dumps(finite(made), allow_nan=False))
    found = read_record(tmp_path, loaded, trial, [])
    assert math.isnan(found["loss"]) and math.isnan(found["speed"]["mfu"])


def test_a_rule_is_fixed_before_the_first_result(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "records").mkdir(parents=True)
    (tmp_path / "out" / "records" / "trial.json").write_text("{}")
    (tmp_path / "out" / "study.yaml").write_text(yaml.safe_dump({"name": "toy-study", "rule": {"margin": 0.02}}))
    loaded, folder = load_study(str(study(write, toy_shards, grid={"data.seed": [1]})))
    with pytest.raises(InputError) as error:
        run_study(loaded, folder, tmp_path / "out", OneProcess())
    assert (error.value.key, error.value.code) == ("rule", "rule-changed")


def test_a_disk_that_is_too_small_is_named(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    huge = {"model.hidden_size": 1 << 17, "model.num_hidden_layers": 1000, "model.num_attention_heads": 2048}
    trials = expand(*load_study(str(study(write, toy_shards, grid={"data.seed": [1]}, common=huge))))
    with pytest.raises(InputError) as error:
        require_room(tmp_path / "out", trials, trunks_of(trials), 1)
    assert (error.value.key, error.value.code) == ("--output", "disk-too-small")
    assert "are free" in require_room(
        tmp_path, expand(*load_study(str(study(write, toy_shards, grid={"data.seed": [1]})))), {}, 1
    )


def test_checkpoints_are_thinned(write: Write, toy_shards: Path, tmp_path: Path) -> None:
    [trial] = expand(*load_study(str(study(write, toy_shards, grid={}, arms={}))))
    for step in (1, 2, 3):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    thin(tmp_path, trial.config, {2})
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3, "without an export the checkpoints are all there is"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    thin(tmp_path, trial.config, {2})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_lengths_and_rates_are_derived(write: Write, toy_shards: Path) -> None:
    def config(**common: Any) -> Any:
        lengths = {"phases.0.steps": 40, "phases.1.steps": 4}
        path = study(write, toy_shards, grid={}, arms={}, common={**lengths, **common})
        return expand(*load_study(str(path)))[0].config

    assert [span.steps for span in config(decay_ratio=0.25).spans] == [40, 10]
    assert [span.steps for span in config(decay_floor=8).spans] == [40, 8]
    assert [span.steps for span in config(decay_ratio=0.25, decay_floor=8).spans] == [40, 10]
    for tokens in (6400, 64000):  # 64 token slots per step
        spans = config(tokens=tokens, decay_share=0.1).spans
        assert [span.steps for span in spans] == [0.9 * tokens / 64, 0.1 * tokens / 64], "the decay's share is constant"
    assert config(lr_of_base=1e-3).optimizer.lr == pytest.approx(1e-3 * 768 / 16)


def test_the_slope_of_the_gain_goes_over_initial_models() -> None:
    records = []
    for size in (16, 32, 64):
        for seed in (0, 1):
            for arm, gain in (("mlm", 0.0), ("detour", 0.01 * np.log2(size) + seed / 1000)):
                point = {"data.seed": seed, "model.init": f"org/model-{size}"}
                scores = {"probe": [0.5 + gain]}
                records.append(record(f"{arm}{size}{seed}", 2.0, arm=arm, point=point, scores=scores, parameters=size))
    [found] = [row for row in slopes(records, "mlm") if row["measure"] == "probe"]
    assert found["slope"] == pytest.approx(0.01)


def test_a_measure_is_found_by_the_content_of_task_and_data(write: Write) -> None:
    """Changed files are measured again; moved ones are not."""

    def address(folder: str, test: str, **protocol: Any) -> str:
        for name, text in (("train", "a\tB-X\n\nb\tO\n"), ("dev", "c\tB-X\n"), ("test", test)):
            write(f"{folder}/{name}.tsv", text)
        files = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
        task = {"name": "t", "kind": "tokens", "score": "entity_f1", "files": files, "protocol": {"preset": "english"}}
        path = write(f"{folder}/t.yaml", yaml.safe_dump(task))
        [measure] = measures_of([EvaluatedTask(task=str(path), protocol=protocol)])
        return measure.address

    first = address("one", "d\tB-X\n")
    assert address("two", "d\tB-X\n") == first
    assert address("one", "e\tB-X\n") != first
    assert address("one", "d\tB-X\n", epochs=3) != first


def test_every_shipped_study_plans_as_a_toy(tmp_path: Path) -> None:
    """The plan reads every file, resolves every trial and states what is decided, without a network."""
    for name in shipped(SHIPPED):
        loaded, _ = load_study(name)
        toy, toys = toy_study(loaded, tmp_path)
        console = Console(file=StringIO(), width=400)
        assert run_study(toy, toys, tmp_path, OneProcess(), console, plan=True)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert toy.toy and 4 <= int(said.partition(" trials")[0]) <= 12
        assert ("Power: " in said) == (loaded.rule is not None), name
        assert "are free" in said
    assert [path.name for path in tmp_path.iterdir()] == ["toy"], "a plan claims no folder"


def test_the_first_orders_run_first(write: Write, toy_shards: Path) -> None:
    loaded, folder = load_study(str(study(write, toy_shards)))
    trials = expand(loaded, folder)
    looking = loaded.model_copy(update={"rule": Rule(look_after=2)})
    first, everything = _parts(looking, trials)
    assert {trial.config.data.seed for trial in first} == {1, 2}
    assert everything == trials
    assert _parts(looking.model_copy(update={"rule": Rule(look_after=3)}), trials) == [trials]
