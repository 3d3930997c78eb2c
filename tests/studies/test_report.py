from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from studies.differences import differences
from studies.plan import Study
from studies.report import write_report
from tests.studies.test_scaling_law import GRID, PLANTED, curve


def record(name: str, loss: float, **changes: Any) -> dict[str, Any]:
    speed = {"workers": 1, "tokens_per_second": 1000.0, "mfu": 0.3}
    record = {"trial": name, "arm": None, "point": {}, "parameters": 10, "tokens": 10, "sequences": 8}
    return record | {"loss": loss, "loss_of": "held-out MLM", "scores": {}, "speed": speed} | changes


def test_planted_law_is_reported(tmp_path: Path) -> None:
    losses = curve(5)
    records = [
        record(f"t{number}", float(loss), parameters=int(size), tokens=int(tokens))
        for number, ((size, tokens), loss) in enumerate(zip(GRID, losses, strict=True))
    ]
    page = write_report(Study(name="s", recipe="demo"), records, tmp_path).read_text()
    [entry] = json.loads((tmp_path / "scaling.json").read_text())
    for exponent, planted in zip(entry["law"]["exponents"], PLANTED, strict=True):
        assert exponent["low"] < planted < exponent["high"]
    assert len(entry["law"]["residuals"]) == len(records)
    assert [row["extrapolated"] for row in entry["frontier"]][-1]
    assert page.count("<svg") >= 3
    assert page.count("extrapolated") >= 2
    assert not {"src=", "href="} & set(page.split()), "one file that needs no network"
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [float(row["loss"]) for row in rows] == list(losses)


def test_a_law_leaves_out_losses_that_are_not_finite(tmp_path: Path) -> None:
    losses = [*curve(5)[:-1], math.nan]
    records = [
        record(f"t{number}", float(loss), parameters=int(size), tokens=int(tokens))
        for number, ((size, tokens), loss) in enumerate(zip(GRID, losses, strict=True))
    ]
    last = records[-1]["trial"]
    page = write_report(Study(name="s", recipe="demo"), records, tmp_path).read_text()
    [entry] = json.loads((tmp_path / "scaling.json").read_text(), parse_constant=pytest.fail)
    assert entry["left_out"] == [last]
    assert len(entry["law"]["residuals"]) == len(records) - 1
    assert f"no finite number: {last}." in page


def test_strong_and_weak_scaling(tmp_path: Path) -> None:
    measured = {"one": (1, 8, 1000.0), "strong": (2, 8, 1600.0), "weak": (2, 16, 1900.0)}
    records = [
        record(name, 2.0, sequences=sequences, speed={"workers": workers, "tokens_per_second": speed, "mfu": 0.3})
        for name, (workers, sequences, speed) in measured.items()
    ]
    write_report(Study(name="s", recipe="demo"), records, tmp_path)
    rows = {row["trial"]: row for row in csv.DictReader((tmp_path / "speed.csv").open())}
    assert float(rows["strong"]["strong_efficiency"]) == pytest.approx(0.8)
    assert float(rows["weak"]["weak_efficiency"]) == pytest.approx(0.95)
    assert [entry["why"] for entry in json.loads((tmp_path / "scaling.json").read_text())] == [
        "neither parameters nor tokens take three values or more"
    ]


def pairs(gain: list[float]) -> list[dict[str, Any]]:
    made = []
    for seed, difference in enumerate(gain):
        for arm, change in (("mlm", 0.0), ("detour", difference)):
            scores = {"ner": [0.5 + seed / 10 - change, 0.6 + seed / 10 - change]}
            point = {"data.seed": seed}
            made.append(record(f"{arm}-{seed}", 2.0 + seed + change, arm=arm, point=point, scores=scores))
    return made


def test_verdicts_are_plain() -> None:
    """Seeds differ far more than arms do, so only a paired comparison shows the difference."""
    better, task = differences(pairs([-0.1, -0.11, -0.09, -0.1]), "mlm")
    assert better.pairs == pytest.approx((-0.1, -0.11, -0.09, -0.1))
    assert (better.measure, better.verdict) == ("loss", "detour is better than mlm")
    assert (task.measure, task.verdict) == ("ner", "detour is better than mlm")
    assert differences(pairs([0.1, 0.11, 0.09]), "mlm")[0].verdict == "detour is worse than mlm"
    assert differences(pairs([0.1, -0.1, 0.2]), "mlm")[0].verdict == "no difference shown"
    assert differences(pairs([0.1]), "mlm")[0].verdict.startswith("no verdict")


def sized(gains: dict[int, float]) -> list[dict[str, Any]]:
    made = []
    for size, gain in gains.items():
        for seed in range(3):
            for arm, change in (("mlm", 0.0), ("detour", gain + seed / 1000)):
                point = {"parameters": size, "data.seed": seed}
                scores = {"ner": [0.5 + seed / 10 + change]}
                made.append(record(f"{arm}-{size}-{seed}", 2.0, arm=arm, point=point, scores=scores, parameters=size))
    return made


def test_sizes_are_never_pooled_and_the_slope_is_found(tmp_path: Path) -> None:
    """A gain that falls from 3 points to -3 over sizes averages to none, and is found at each size and as a slope."""
    gains = {size: 0.03 - 0.015 * step for step, size in enumerate((16, 32, 64, 128, 256))}
    found = [entry for entry in differences(sized(gains), "mlm") if entry.measure == "ner"]
    assert [(entry.at["parameters"], len(entry.pairs)) for entry in found] == [(size, 3) for size in gains]
    assert [entry.verdict.split()[2] for entry in (found[0], found[-1])] == ["better", "worse"]
    study = Study(name="s", recipe="demo", arms={"mlm": {}, "detour": {}})
    page = write_report(study, sized(gains), tmp_path).read_text()
    [row] = [row for row in json.loads((tmp_path / "gains.json").read_text()) if row["measure"] == "ner"]
    assert row["slope"] == pytest.approx(-0.015)
    assert row["low"] < row["slope"] < row["high"] < 0
    assert "per doubling" in page


def test_several_comparisons_are_corrected() -> None:
    records = pairs([0.1, 0.12, 0.02])
    [loss, _] = differences(records, "mlm")
    assert loss.p is not None and loss.p_holm == pytest.approx(min(1, 2 * loss.p))
    assert loss.verdict == "no difference shown"


def test_report_says_what_was_compared(tmp_path: Path) -> None:
    study = Study(name="s", recipe="demo", arms={"mlm": {}, "detour": {}})
    page = write_report(study, pairs([0.1, -0.1, 0.2]), tmp_path).read_text()
    assert "no difference shown" in page
    assert page.count("<svg") >= 2, "a chart for each measure"
    table = (tmp_path / "comparison.md").read_text()
    assert table.count("\n") == 4 and "detour - mlm" in table
    assert r"95 \% interval" in (tmp_path / "comparison.tex").read_text()
    assert "corrected for 2 comparisons" in page
    [loss, ner] = json.loads((tmp_path / "comparison.json").read_text())
    assert (loss["arm"], loss["baseline"], len(loss["pairs"]), ner["measure"]) == ("detour", "mlm", 3, "ner")
