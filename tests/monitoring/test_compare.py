import io
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import InputError
from monitoring.compare import compare
from tests.monitoring.synthetic import drive, make_config, make_recorder
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
    for text in ("detour (a)", "detour (c)", "twin", "CLM then MLM", "MLM then MLM", "12 of 30", "27.5k", "100 %"):
        assert text in page.said, text
        assert text in printed, text
    assert "nan" not in page.said.lower()


def test_runs_without_a_line_yet_can_be_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 0, name=name) for name in ("a", "b")]
    assert "svg" not in Page(compare(runs, tmp_path / "page.html", Console(file=io.StringIO())).read_text()).count


@pytest.mark.parametrize("count", [0, 1, 9])
def test_two_to_eight_runs(tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match=f"2 to 8 run directories, got {count}"):
        compare([tmp_path] * count, tmp_path / "page.html")


def test_what_is_no_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        compare([tmp_path, tmp_path], tmp_path / "page.html")
