"""Traces that a failed run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import RunFailedError
from configs.load import dump_config
from launcher.job import failures_recorded
from monitoring.log import read_events
from monitoring.run_directory import RunDirectory
from tests.monitoring.synthetic import make_config


@pytest.mark.parametrize("readable", [True, False])
def test_a_failed_run_says_why_and_gets_its_report(tmp_path: Path, readable: bool) -> None:
    """An error of the report, which needs the configuration, does not hide why the run failed."""
    run = RunDirectory(tmp_path)
    if readable:
        run.config.write_text(dump_config(make_config()))
    with pytest.raises(RunFailedError, match="no finite gradient"), failures_recorded(tmp_path):
        raise RunFailedError("no finite gradient")
    (event,) = read_events(tmp_path)
    assert (event["event"], event["step"], event["detail"]) == ("failed", 0, "no finite gradient")
    assert run.report.exists() == readable
    if readable:
        assert "Failed at step 0 of 30" in run.report.read_text()
