"""The report and the comparison in a real browser."""

from __future__ import annotations

import io
import math
import random
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from monitoring import log
from monitoring.compare import compare
from monitoring.events import Exported, Finished, Resumed, Started, WorkerFailed, WorkersStarted, record
from monitoring.report import write_report
from monitoring.run_directory import RunDirectory
from tests.monitoring.browser import needs_chromium, photograph
from tests.monitoring.synthetic import make_config, make_record, make_recorder

STEPS = (1000, 100)


class Clock(datetime):
    """Stands in for `datetime` in monitoring.log: a step takes 0.95 seconds of its time."""

    step, lost = 0, 0.0

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return datetime.fromisoformat("2026-11-23T09:00:00+00:00") + timedelta(seconds=0.95 * cls.step + cls.lost)


def make_run(directory: Path, name: str, seed: int, floor: float, objective: str = "clm") -> Path:
    """A run as a small one looks: noise, a switch, a worker lost, held-out losses."""
    chance = random.Random(seed)
    phases = [
        {"objective": objective, "steps": STEPS[0], "lr": {"warmup": "30 steps"}},
        {"objective": "mlm", "steps": STEPS[1], "lr": {"shape": "1-sqrt", "final": 0.1}},
    ]
    config = make_config(name=name, phases=phases, monitoring={"every": "5 steps"})
    Clock.step, Clock.lost = 0, 0.0
    recorder = make_recorder(directory, config)
    record(directory, WorkersStarted(workers=["10.0.0.1", "10.0.0.2"], seconds=8.2))
    record(directory, Started(step=0, precision="bf16"))
    recorder.phase_started(0, objective, 0)
    for step in range(1, sum(STEPS) + 1):
        Clock.step = step
        phase = int(step > STEPS[0])
        if step == STEPS[0] + 1:
            recorder.phase_started(1, "mlm", STEPS[0])
        into = step - STEPS[0] * phase
        loss = (floor + 7 * math.exp(-step / 140)) if not phase else floor - 1 + math.exp(-into / 30)
        held_out = {"clm": loss + 0.1 + 0.6 * phase, "mlm": floor - 0.6 + 7 * math.exp(-step / 250) - 0.3 * phase}
        recorder.step(
            make_record(
                config,
                step,
                phase=phase,
                objective=phases[phase]["objective"],
                loss=loss + chance.gauss(0, 0.1),
                eval_loss=held_out if step % 50 == 0 else None,
                eval_accuracy={key: math.exp(-loss / 4) for key, loss in held_out.items()} if step % 50 == 0 else None,
                learning_rate=2e-4 * min(1, step / 30) if not phase else 2e-4 * (1 - 0.9 * math.sqrt(into / 100)),
                grad_norm=0.6 + 1.5 * math.exp(-step / 200) + chance.expovariate(8),
                tokens=1010 + chance.randint(-9, 9),
                step_seconds=0.9 + chance.expovariate(20),
                data_wait_seconds=chance.expovariate(300),
                packing_ratio=0.985 + chance.gauss(0, 0.003),
                flops=3e10,
            )
        )
        if step % 200 == 0 or step == sum(STEPS):
            recorder.checkpoint_saved(step, 0.7, directory / "checkpoints" / f"step-{step:08d}")
        if step == 530 and seed == 1:
            record(directory, WorkerFailed(step=step, reason="died", rank=1, detail="exit by signal 9"))
            Clock.lost = 12.0
            record(directory, Resumed(step=400, precision="bf16"))
            Clock.lost += 0.95 * 130  # the steps since that checkpoint, done again
    recorder.close()
    record(directory, Exported(step=sum(STEPS), path="hf"))
    record(directory, Finished(step=sum(STEPS)))
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "datetime", Clock)
        return [
            make_run(folder / "base-bio-en", "base-bio-en", 1, 3.1),
            make_run(folder / "base-bio-en-twin", "base-bio-en-twin", 2, 3.3, objective="mlm"),
            make_run(folder / "large-bio-en", "large-bio-en", 3, 2.8),
        ]


@needs_chromium
@pytest.mark.parametrize(
    ("name", "size", "dark"),
    [("report", (1200, 4980), False), ("report-dark", (1200, 4980), True), ("report-phone", (500, 6520), False)],
)
def test_the_report_opens_without_a_complaint(
    runs: list[Path], name: str, size: tuple[int, int], dark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # the pictures are no place for the paths of the machine that took them
        patch.chdir(runs[0].parent)
        patch.setattr(Path, "cwd", lambda: Path("/home/ada/runs"))
        write_report(Path(runs[0].name))
    assert photograph(RunDirectory(runs[0]).report, name, size, dark) == []


@needs_chromium
def test_the_comparison_opens_without_a_complaint(runs: list[Path], tmp_path: Path) -> None:
    page = compare(runs, tmp_path / "compare.html", Console(file=io.StringIO()))
    assert photograph(page, "compare", (1200, 2250)) == []


@needs_chromium
def test_a_complaint_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DETOUR_SCREENSHOTS", raising=False)
    page = tmp_path / "page.html"
    page.write_text("<script>missing()</script>")
    assert any("missing is not defined" in line for line in photograph(page, "page", (300, 300)))
