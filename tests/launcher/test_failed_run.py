"""What a run that fails leaves behind."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from configs.errors import RunFailedError
from launcher import job
from launcher.group import Shape
from monitoring.log import read_events
from tests.monitoring.synthetic import make_config


@pytest.mark.parametrize("broken", [False, True])
def test_a_failed_run_says_why_and_gets_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """The workers are replaced by one that fails; an error of the report itself does not hide that."""

    def fail(*arguments: object) -> None:
        raise RunFailedError("no finite gradient")

    for name in ("connect", "_importing"):
        monkeypatch.setattr(job, name, lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(job, "ensure_prepared", lambda *arguments: None)
    monkeypatch.setattr(job, "_check", lambda *arguments: ([Shape(1, 1, gpu=False)], "fp32"))
    monkeypatch.setattr(job, "_attempts", fail)
    if broken:
        monkeypatch.setattr(job, "write_report", lambda directory: 1 / 0)
    config = make_config(monitoring={"every": "4 steps", "targets": str(tmp_path / "targets")})
    with pytest.raises(RunFailedError, match="no finite gradient"):
        job.run_job(config, tmp_path / "run")
    (event,) = read_events(tmp_path / "run")
    assert (event["event"], event["step"], event["detail"]) == ("failed", 0, "no finite gradient")
    if not broken:
        assert "Failed at step 0 of 30" in (tmp_path / "run" / "report.html").read_text()
