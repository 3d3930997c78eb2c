from __future__ import annotations

import csv
import json
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


def test_report_says_what_was_compared(tmp_path: Path) -> None:
    study = Study(name="s", recipe="demo", arms={"mlm": {}, "detour": {}})
    page = write_report(study, pairs([0.1, -0.1, 0.2]), tmp_path).read_text()
    assert "no difference shown" in page
    [loss, ner] = json.loads((tmp_path / "comparison.json").read_text())
    assert (loss["arm"], loss["baseline"], len(loss["pairs"]), ner["measure"]) == ("detour", "mlm", 3, "ner")
