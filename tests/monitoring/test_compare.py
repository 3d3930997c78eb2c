import io
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import InputError
from monitoring.compare import compare, scaling_efficiency
from monitoring.run_files import open_run
from tests.monitoring.synthetic import drive, make_config, make_record, make_recorder
from tests.monitoring.test_report import Page

TWIN = [{"objective": "mlm", "steps": 20, "mask_rate": 0.3}, {"objective": "mlm", "steps": 10}]


def make_run(directory: Path, steps: int, **changes: object) -> Path:
    config = make_config(**changes)
    recorder = make_recorder(directory, config)
    drive(recorder, config, range(1, steps + 1))
    recorder.close()
    return directory


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", 30, name="detour"),
        make_run(tmp_path / "b", 30, name="twin", phases=TWIN),
        make_run(tmp_path / "c", 12, name="detour"),
        make_run(tmp_path / "d", 0, name="young"),
    ]
    console = Console(file=io.StringIO(), width=160)
    page = Page(compare(runs, tmp_path / "out" / "page.html", console).read_text())
    assert page.loaded == []
    assert page.count["svg"] == 7
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("detour (a)", "detour (c)", "twin", "CLM then MLM", "MLM then MLM", "12 of 30", "27.5k"):
        assert text in page.said, text
        assert text in printed, text
    assert "nan" not in page.said.lower()
    assert "scaling efficiency" not in printed, "nothing was scaled"


def test_runs_of_one_name_are_told_apart_by_as_much_of_the_path_as_that_takes(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 0, name="detour") for name in ("a/run", "b/run", "c")]
    page = Page(compare(runs, tmp_path / "page.html", Console(file=io.StringIO())).read_text())
    for name in (f"detour ({runs[0]})", f"detour ({runs[1]})", "detour (c)"):
        assert name in page.said


def test_the_working_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make_run(tmp_path / "b", 0, name="detour")
    monkeypatch.chdir(make_run(tmp_path / "a", 0, name="detour"))
    printed = io.StringIO()
    compare([Path(), other], tmp_path / "page.html", Console(file=printed, width=100))
    assert "detour (a)" in printed.getvalue()


def test_different_tokenizers_are_told(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 0, tokenizer=f"org/{name}") for name in "ab"]
    assert "org/b" in Page(compare(runs, tmp_path / "page.html", Console(file=io.StringIO())).read_text()).said
    for run in runs:
        (run / "tokenizer").mkdir()
        (run / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "org/b" not in Page(compare(runs, tmp_path / "page.html", Console(file=io.StringIO())).read_text()).said


def test_a_clock_set_back_takes_no_time_away(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0)
    times = ("10:00:00", "10:00:30", "08:00:00", "08:00:10")
    lines = [f'{{"event": "resumed", "time": "2026-11-28T{time}+00:00", "step": 0}}\n' for time in times]
    (run / "events.jsonl").write_text("".join(lines))
    assert open_run(run).seconds == 40


def test_scaling_efficiency_compares_steps_of_one_objective(tmp_path: Path) -> None:
    """The causal half of the detour is twice as fast as masked steps, which says nothing of its devices."""
    runs = []
    for name, phases, slower in (("detour", None, 1.0), ("twin", TWIN, 1.0), ("slow", TWIN, 1.25)):
        config = make_config(name=name, **({"phases": phases} if phases else {}))
        recorder = make_recorder(tmp_path / name, config)
        for step in range(1, 31):
            masked = config.phases[int(step > 20)].objective == "mlm"
            recorder.step(make_record(config, step, tokens=1000, step_seconds=slower * (0.2 if masked else 0.1)))
        recorder.close()
        runs.append(open_run(tmp_path / name))
    assert [scaling_efficiency(run, runs) for run in runs] == pytest.approx([1, 1, 0.8])


def test_runs_without_a_line_yet_can_be_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 0, name=name) for name in ("a", "b")]
    assert "svg" not in Page(compare(runs, tmp_path / "page.html", Console(file=io.StringIO())).read_text()).count


def test_a_study_of_ten_runs_fits(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(number), 2, name=f"r{number}") for number in range(10)]
    page = Page(compare(runs, tmp_path / "page.html", Console(file=io.StringIO())).read_text())
    assert all(f"r{number}" in page.said for number in range(10))


@pytest.mark.parametrize("count", [0, 1, 65])
def test_two_to_many_runs(tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match=f"got {count}") as error:
        compare([tmp_path] * count, tmp_path / "page.html")
    assert error.value.code == "number-of-runs"


def test_what_is_no_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        compare([tmp_path, tmp_path], tmp_path / "page.html")
    assert error.value.code == "not-a-run"
