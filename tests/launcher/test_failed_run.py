"""Traces that a failed run leaves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import RunFailedError
from configs.load import dump_config
from datapipe.tokenizer import load_tokenizer
from launcher.exits import BAD_INPUT, FAILED, run_command
from launcher.job import _end_without_head, _finish, failures_recorded
from launcher.stop import StopRequest
from monitoring.log import read_events
from monitoring.progress import Progress
from monitoring.run_directory import RunDirectory
from tests.monitoring.synthetic import make_config
from tests.toy_recipe import TOKENIZER


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


def test_a_run_that_was_killed_after_its_export_is_finished_by_the_next_start(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(dump_config(make_config()))
    run.export.mkdir()
    for _ in range(2):
        _finish(make_config(), tmp_path, load_tokenizer(TOKENIZER), Console(quiet=True))
    assert [event["event"] for event in read_events(tmp_path)] == ["finished"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FAILED, "free space"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), FAILED, "No space left on device: 'b'"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", ".a.partial", None, "a"), BAD_INPUT, "a: Is a directory"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.txt/b"), BAD_INPUT, "a.txt/b: Not a directory"),
        (OSError(errno.EROFS, "Read-only file system", "/cdrom/a"), BAD_INPUT, "/cdrom/a: Read-only file system"),
    ],
)
def test_paths_and_disks_that_take_no_file_are_no_traceback(
    error: OSError, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as end:
        run_command(command)
    printed = capsys.readouterr().err
    assert end.value.code == code and printed.startswith("error: ") and words in printed and "Traceback" not in printed


def test_a_signal_that_ends_the_head_of_ray_too_is_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunDirectory(tmp_path).config.write_text(dump_config(make_config()))
    monkeypatch.setattr("launcher.job.SAVE_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    with StopRequest() as stop:
        for kind in ("failed", "stopped"):
            _end_without_head("the head is gone", tmp_path, stop, Progress(tmp_path, Console(quiet=True)))
            assert read_events(tmp_path)[-1]["event"] == kind
            if kind == "failed":
                os.kill(os.getpid(), signal.SIGTERM)
