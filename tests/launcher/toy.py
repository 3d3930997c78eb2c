"""Runs of a toy model through the real command line, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from safetensors.numpy import load_file

from tests.toy_recipe import toy_recipe

ROOT = Path(__file__).parents[2]
DETOUR = [sys.executable, "-m", "detour_train"]
TRAIN = [*DETOUR, "train"]


def recipe(shards: Path, **changes: Any) -> dict[str, Any]:
    """The toy recipe on two workers; `changes` replace sections, or keys in them."""
    return toy_recipe([{"name": "en", "shards": str(shards)}], {"cluster": {"workers_per_node": 2}}, changes)


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def run(
    *command: str | Path,
    cwd: Path,
    path: Path | None = ROOT,
    timeout: float = 500,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        command: The words of it.
        cwd: Its working directory.
        path: Its PYTHONPATH; None: Detour is installed.
        timeout: Seconds after which it is killed.
        env: Its whole environment, in place of ours with `path`.
    """
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env or environment(path), capture_output=True, text=True, timeout=timeout
    )


def environment(path: Path | None = ROOT) -> dict[str, str]:
    here = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**here, "COLUMNS": "200"} | ({"PYTHONPATH": str(path)} if path else {})


@contextmanager
def started(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> Iterator[psutil.Popen]:
    """Run a command in the background, writing to output.txt; kill it and all its descendants at the end."""
    output = (cwd / "output.txt").open("a")
    process = psutil.Popen(list(map(str, command)), cwd=cwd, env=env or environment(), stdout=output, stderr=output)
    try:
        yield process
    finally:
        family = [process, *process.children(recursive=True)] if process.is_running() else []
        for member in reversed(family):
            member.kill()
        process.wait()
        output.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a JSONL file: a run may be in the middle of writing the last one."""
    complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in complete.splitlines()]


def steps(directory: Path) -> list[int]:
    return [line["step"] for line in lines(directory / "metrics.jsonl")]


def events(directory: Path) -> list[str]:
    return [line["event"] for line in lines(directory / "events.jsonl")]


def wait_for(condition: Callable[[], Any], process: psutil.Popen, timeout: float = 1000, pause: float = 0.05) -> Any:
    """Wait for a true value of `condition`; fail as soon as the process has ended."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert process.poll() is None, f"ended with {process.returncode} first"
        assert time.monotonic() < deadline, "never came true"
        time.sleep(pause)
    return value


def until(condition: Callable[[], object], timeout: float = 1000) -> None:
    """Wait for a condition of a run that is not our process."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.1)


def workers(process: psutil.Popen) -> list[psutil.Process]:
    """List the training processes of a job on a local cluster, by age."""
    return [child for child in process.children(recursive=True) if child.name().startswith("ray::Worker.tra")]


def assert_same_run(directory: Path, other: Path) -> None:
    """Every step once, and bit by bit the other run's losses, gradient norms and weights."""
    mine, theirs = lines(directory / "metrics.jsonl"), lines(other / "metrics.jsonl")
    assert steps(directory) == list(range(1, len(theirs) + 1))
    for line, same in zip(mine, theirs, strict=True):
        for key in ("phase", "objective", "loss", "tokens", "learning_rate", "grad_norm"):
            assert line[key] == same[key], (key, line, same)
    weights, same_weights = (load_file(run / "hf" / "model.safetensors") for run in (directory, other))
    assert weights.keys() == same_weights.keys()
    for name in weights:
        assert np.array_equal(weights[name], same_weights[name]), name
