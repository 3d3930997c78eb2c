import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.load import dump_config
from monitoring.charts import Line, line_chart, smoothed, ticks
from monitoring.events import CheckpointSaved, StepSkipped, record
from monitoring.log import append_event
from monitoring.report import write_report
from monitoring.run_directory import RunDirectory
from monitoring.run_files import open_run, read_steps
from tests.monitoring.synthetic import FINISHED, STARTED, drive, make_config, make_record, make_recorder

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Checks that tags nest and collects what a page would load and say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.count: dict[str, int] = {}
        self.said = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.loaded += [f"{key}={value}" for key, value in attrs if key in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def read(directory: Path) -> Page:
    text = write_report(directory).read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    page = Page(text)
    assert page.loaded == []
    return page


def test_a_finished_run_is_whole_and_self_contained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    record(tmp_path, STARTED)
    recorder = make_recorder(tmp_path, config)
    recorder.phase_started(0, "clm", 0)
    drive(recorder, config, range(1, 21))
    recorder.phase_started(1, "mlm", 20)
    recorder.checkpoint_saved(20, 0.5, tmp_path / "checkpoints" / "step-00000020")
    append_event(tmp_path, "worker_failed", step=24, reason="<b>killed</b>")
    drive(recorder, config, range(21, 31))
    recorder.close()
    record(tmp_path, FINISHED)
    monkeypatch.chdir(tmp_path.parent)
    page = read(tmp_path)
    assert f"cd {tmp_path.parent} && detour-train {tmp_path}/config.yaml --output {tmp_path}-again" in page.said
    for text in (
        "Finished",
        "CLM loss",
        "MLM loss",
        "checkpoint saved at step 20",
        "phase started at step 20",
        "<b>killed</b>",
        "clipped in 100 % of the steps of phase 1, 100 % of the steps of phase 2",
    ):
        assert text in page.said, text
    assert page.count["svg"] == 10
    assert "nan" not in page.said.lower()


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_young_run_has_a_report_too(tmp_path: Path, steps: int) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, steps + 1))
    recorder.close()
    page = read(tmp_path)
    assert "Not started" in page.said
    assert ("Nothing logged yet." in page.said) == (steps < 4)


def test_a_run_that_no_one_ended_has_the_time_of_its_last_word(tmp_path: Path) -> None:
    config = make_config()
    record(tmp_path, STARTED)
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 5))
    recorder.close()
    assert re.search(r"Running, step 4 of \d+; last heard of \d{4}-\d\d-\d\d \d\d:\d\d UTC", read(tmp_path).said)


def test_losses_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    config = make_config(monitoring={"every": "1 steps"})
    recorder = make_recorder(tmp_path, config)
    for step in range(1, 21):
        accuracy = {"clm": math.nan if step == 5 else 0.25}
        recorder.step(
            make_record(
                config,
                step,
                loss=math.nan if step in (1, 7, 20) else 3.0 + step / 10,
                eval_loss={"clm": 2.0} if step % 5 == 0 else None,
                eval_accuracy=accuracy if step % 5 == 0 else None,
            )
        )
    recorder.close()
    said = read(tmp_path).said
    assert "nan" not in said.lower()
    assert "25 % → 25 %" in said
    assert re.search(r"from 3\.200, \d\S* % higher", said)


def test_an_axis_from_zero_stays_there_when_all_is_zero() -> None:
    drawn = line_chart(
        "wait", [Line("wait", [(1.0, 0.0), (2.0, 0.0)], "ink")], number=lambda y: f"<{y:g}>", from_zero=True
    )
    assert ("&lt;0&gt;" in drawn, "&lt;1&gt;" in drawn, "&lt;-" in drawn) == (True, True, False)


def test_a_directory_that_is_no_run_is_bad_input(tmp_path: Path) -> None:
    RunDirectory(tmp_path).metrics.touch()
    with pytest.raises(InputError, match=r"config\.yaml") as error:
        write_report(tmp_path)
    assert error.value.code == "not-a-run"


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.integers(2, 12))
def test_ticks_are_evenly_spaced_and_enclose(low: float, width: float, count: int) -> None:
    marks = ticks(low, low + width, count)
    slack = 1e-6 * max(abs(low), width, 1e-9)
    assert marks[0] <= low + slack
    assert marks[-1] >= low + width - slack
    assert 2 <= len(marks) <= 2 * count + 3


def test_thinning_keeps_the_peak() -> None:
    points = [(float(x), 1.0) for x in range(50_000)]
    points[31_337] = (31_337.0, 9.0)
    drawn = line_chart("loss", [Line("loss", points, "clm")], number=str)
    assert len(drawn) < 40_000
    top = min(float(pair.split(",")[1]) for pair in drawn.split('points="')[1].split('"')[0].split())
    whole = line_chart("loss", [Line("loss", points[31_330:31_340], "clm")], number=str)
    assert top == min(float(pair.split(",")[1]) for pair in whole.split('points="')[1].split('"')[0].split())


def test_smoothing_keeps_a_constant_and_follows_a_level() -> None:
    assert [y for _, y in smoothed([(float(x), 2.0) for x in range(100)])] == pytest.approx([2.0] * 100)
    stepped = smoothed([(float(x), 0.0 if x < 500 else 1.0) for x in range(1000)])
    assert stepped[499][1] == 0
    assert stepped[-1][1] > 0.99


def test_a_mixture_of_objectives(tmp_path: Path) -> None:
    config = make_config(phases=[{"objective": {"clm": 1, "mlm": 15}, "steps": 20}, {"objective": "mlm", "steps": 10}])
    record(tmp_path, STARTED)
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 31))
    recorder.close()
    assert "CLM+MLM" in read(tmp_path).said
    run = open_run(tmp_path)
    assert [len(run.losses(name)) for name in ("clm", "mlm", "clm+mlm")] == [5, 8, 0]
    assert run.now is not None
    assert run.now.loss.keys() == {"clm", "mlm", "clm+mlm"} and run.now.counters.tokens["clm"] == 20 * 300


def test_a_long_run_is_thinned_and_keeps_its_peaks_evaluations_and_faults(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(dump_config(make_config()))
    with run.metrics.open("w") as file:
        for step in range(1, 3001):
            line: dict[str, Any] = {
                **dict.fromkeys(("tokens", "learning_rate", "packing_ratio", "mfu", "tokens_per_second"), 1.0),
                **dict.fromkeys(("step_seconds", "data_wait_seconds"), 1.0),
                "step": step,
                "phase": int(step > 1500),
                "objective": "clm" if step <= 1500 else "mlm",
            }
            line |= {"loss": 99.0 if step == 1234 else 3.0, "grad_norm": 1.0 if step != 777 else 55.0}
            line |= {"eval_loss": {"mlm": 2.0}} if step == 2345 else {}
            file.write(json.dumps(line) + "\n")
    rows = read_steps(tmp_path, most=200)
    steps = [row["step"] for row in rows]
    assert len(rows) <= 210 and steps == sorted(set(steps))
    assert {1, 777, 1234, 1500, 1501, 2345, 3000} <= set(steps)
    assert len(read_steps(tmp_path, most=3000)) == 3000
    run.metrics.unlink()
    for number in range(3000):
        fault = StepSkipped(step=7, loss=1.0, grad_norm=1.0, where=f"sequence {number}")
        saved = CheckpointSaved(step=number, seconds=1, stall_seconds=0, path="p")
        record(tmp_path, fault if number == 1000 else saved)
    page = write_report(tmp_path).read_text()
    assert len(page) < 500_000 and "sequence 1000" in page and "2499 more are in events.jsonl" in page
