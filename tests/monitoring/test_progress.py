import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from monitoring.formatting import format_seconds
from monitoring.progress import Progress, describe
from monitoring.telemetry import Telemetry
from tests.monitoring.synthetic import drive, make_config, make_recorder


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (42, "42 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (7320, "2 h 2 min"),
        (200_000, "2 d 7 h"),
        (float("nan"), "?"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_line_says_where_the_run_stands(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 23))
    recorder.close()
    now = Telemetry.read(tmp_path)
    assert now
    assert describe(now) == "phase 2/2 mlm · step 22/30 · loss 4.329 · 4.15k tokens/s · 2 s left"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_follows_the_run_and_ends_on_its_last_step(tmp_path: Path, terminal: bool) -> None:
    config = make_config()
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120)
    with Progress(tmp_path, console) as progress:
        progress.note("starting 2 workers")
        while "starting 2 workers · " not in output.getvalue():
            time.sleep(0.05)
        recorder = make_recorder(tmp_path, config)
        drive(recorder, config, range(1, 12))
        recorder.flush()
        while "phase 1/2 clm · step 11/30" not in output.getvalue():
            time.sleep(0.05)
        drive(recorder, config, range(12, 31))
        recorder.close()
    last = [line for line in re.split(r"[\r\n]", output.getvalue()) if "step" in line][-1]
    assert "phase 2/2 mlm · step 30/30 · loss 3.231 · " in last
    assert "done" in last
