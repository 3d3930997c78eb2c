"""The whole line at toy size, through the real command line, Ray and Megatron-Core."""

from __future__ import annotations

import re
import shutil
import signal
import urllib.request
from pathlib import Path

import pytest

from detour_train import PACKAGES
from tests.launcher.toy import (
    DETOUR,
    ROOT,
    TRAIN,
    assert_same_run,
    events,
    lines,
    run,
    started,
    steps,
    wait_for,
    workers,
)

TOTAL = 9
OURS = re.compile(rf"Traceback|error: |{re.escape(str(ROOT))}/(?!\.venv)|\b({'|'.join(PACKAGES)})\.")
"""A line of stderr that is no upstream library's affair: an error, or a path or a logger of our packages."""


def test_run_leaves_what_it_promises(undisturbed: Path) -> None:
    assert events(undisturbed) == [
        "workers_started",
        "started",
        "phase_started",
        *["checkpoint_saved"] * 3,
        "phase_started",
        *["checkpoint_saved"] * 2,
        "exported",
        "finished",
    ]
    for name in ("config.yaml", "report.html", "checkpoints/step-00000009/detour.json", "hf/config.json"):
        assert (undisturbed / name).is_file(), name
    said = (undisturbed.parent / "stdout.txt").read_text()
    assert re.search(r"phase 1 clm +loss [\d.]+ -> [\d.]+", said)
    assert re.search(r"phase 2 mlm +loss [\d.]+ -> [\d.]+", said)
    for place in ("hf", "report.html", "/metrics", "tokens/s"):
        assert place in said
    (start,) = [event for event in lines(undisturbed / "events.jsonl") if event["event"] == "started"]
    assert start["precision"] == "fp32" and "precision fp32\n" in said
    complaints = [line for line in (undisturbed.parent / "stderr.txt").read_text().splitlines() if OURS.search(line)]
    assert not complaints, "a run that goes well has nothing to complain about"


def test_exported_model_loads_and_fills_a_mask(undisturbed: Path) -> None:
    from transformers import pipeline

    filled = pipeline("fill-mask", model=str(undisturbed / "hf"))("The patient was treated with [MASK].")
    assert len(filled) == 5
    assert all(0 < row["score"] <= 1 for row in filled)


def test_a_complete_run_says_so_and_changes_nothing(undisturbed: Path) -> None:
    before = (undisturbed / "events.jsonl").read_bytes()
    result = run(*TRAIN, undisturbed.parent / "toy.yaml", "--output", undisturbed, cwd=undisturbed.parent)
    assert result.returncode == 0
    assert "nothing is left to train" in result.stdout
    assert (undisturbed / "events.jsonl").read_bytes() == before
    assert "9 of 9, complete" in run(*DETOUR, "inspect", undisturbed, cwd=undisturbed).stdout


def test_killed_worker_and_stopped_driver_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL a worker, SIGTERM the job once it goes on, submit it again: bit by bit the undisturbed run."""
    command: list[str | Path] = [*TRAIN, undisturbed.parent / "toy.yaml", "--output", "run", "monitoring.port=9464"]
    directory = tmp_path / "run"
    with started(*command, cwd=tmp_path) as job:
        wait_for(lambda: 3 in steps(directory), job)
        workers(job)[-1].send_signal(signal.SIGKILL)
        wait_for(lambda: "resumed" in events(directory), job)
        wait_for(lambda: 5 in steps(directory), job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(200) == 75
    assert events(directory).count("worker_failed") == 1
    assert lines(directory / "events.jsonl")[-1]["event"] == "stopped"
    saved = max(line["step"] for line in lines(directory / "events.jsonl") if line["event"] == "checkpoint_saved")
    assert steps(directory)[-1] == saved < TOTAL, "a stopped job has saved its last step"
    assert run(*command, cwd=tmp_path).returncode == 0
    assert_same_run(directory, undisturbed)


def test_tensor_parallel_workers_train_the_same_model(undisturbed: Path, tmp_path: Path) -> None:
    result = run(
        *TRAIN,
        undisturbed.parent / "toy.yaml",
        *("--output", "run", "parallel.tensor=2", "parallel.sequence=true"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for mine, theirs in zip(lines(tmp_path / "run/metrics.jsonl"), lines(undisturbed / "metrics.jsonl"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_busy_port_is_replaced_and_announced(undisturbed: Path, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        command: list[str | Path] = [
            *TRAIN,
            undisturbed.parent / "toy.yaml",
            "--output",
            "run",
            f"monitoring.port={port}",
        ]
        with started(*command, cwd=tmp_path) as job:
            said = wait_for(
                lambda: re.search(
                    r"metrics +(http://127\.0\.0\.1:(\d+)/metrics)", (tmp_path / "output.txt").read_text()
                ),
                job,
            )
            assert int(said[2]) > port
            page = urllib.request.urlopen(said[1], timeout=10).read().decode()
            assert re.search(r'^detour_run_info\{.*run="toy".*\} 1\.0$', page, re.MULTILINE)


def test_a_damaged_initial_checkpoint_fails_once_and_clearly(undisturbed: Path, tmp_path: Path) -> None:
    """Found by the workers, so it crosses Ray; it spends no retry."""
    shutil.copytree(undisturbed / "checkpoints" / "step-00000009", tmp_path / "init")
    tensors = max((tmp_path / "init").glob("*.distcp"), key=lambda path: path.stat().st_size)
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\xff")
    result = run(
        *TRAIN,
        undisturbed.parent / "toy.yaml",
        *("--output", "run", f"model.init={tmp_path}/init"),
        cwd=tmp_path,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(rf"error: .*{tensors.name}", result.stderr)
    assert events(tmp_path / "run")[-1] == "failed"
    assert "worker_failed" not in events(tmp_path / "run")
    assert (tmp_path / "run/report.html").is_file()
