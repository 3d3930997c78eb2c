"""The failures that a run survives, and those that end it at once."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import ray
from rich.console import Console

from configs.errors import InputError, RunFailedError
from configs.load import load_config
from launcher.claim import claim, token_of
from launcher.failures import FailureBudget, HangWatch, WorkerError, root_cause
from launcher.growth import GrowthWatch
from launcher.job import failures_recorded, run_job
from launcher.preflight import WORKING_COPIES
from launcher.stop import PREEMPTED, SIGNAL, StopRequest
from launcher.supervisor import Run, supervise
from launcher.topology import check_tensor_groups
from launcher.worker import RankAssignment, RunResult, Worker
from launcher.worker_group import address_in, import_error, rays_account, wait_for_results
from monitoring.events import Resized, record
from monitoring.log import append_event, held_events, read_events
from monitoring.progress import Progress
from monitoring.telemetry import Telemetry


def died(rank: int = 0) -> WorkerError:
    return WorkerError("died", rank, "its process ended")


def test_budget_is_spent_and_named() -> None:
    budget = FailureBudget(allowed=2)
    budget.spend(died(), saved=5)
    budget.spend(died(), saved=9)
    with pytest.raises(RunFailedError, match=r"rank 1: .*cluster\.max_failures.* 2.* 12"):
        budget.spend(died(1), saved=12)


def test_an_error_raised_twice_without_a_checkpoint_between_is_not_tried_a_third_time() -> None:
    budget = FailureBudget(allowed=100)
    budget.spend(WorkerError("exception", 0, "RuntimeError: [10.0.0.1:4711] 0x7f01 no"), saved=7)
    with pytest.raises(RunFailedError, match=r"2 times .* 7\)"):
        budget.spend(WorkerError("exception", 0, "RuntimeError: [10.0.0.1:5122] 0x7f02 no"), saved=7)


def test_progress_between_two_equal_errors_makes_them_two_errors() -> None:
    budget = FailureBudget(allowed=100)
    for step in range(20):
        assert budget.spend(WorkerError("exception", 0, "ValueError: no"), step) == 0


def test_deaths_without_progress_wait_longer_and_end() -> None:
    budget = FailureBudget(allowed=100)
    assert [budget.spend(died(), saved=3), budget.spend(died(), saved=3)] == [0, 1]
    with pytest.raises(RunFailedError, match="3 times"):
        budget.spend(died(), saved=3)


def test_the_culprit_is_not_who_complains_of_another() -> None:
    peer = WorkerError("exception", 0, "RuntimeError: [10.0.0.2]:5122: Connection closed by peer")
    cause = WorkerError("exception", 1, "ValueError: no")
    assert root_cause([peer, cause], first_rank=0) is cause
    assert root_cause([died(2), cause], first_rank=1).rank == 2
    assert root_cause([died(0), died(2)], first_rank=2).rank == 2


def test_a_full_disk_is_no_hang_and_loses_no_event(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=False).returncode:
        pytest.skip("a small disk needs the right to mount")
    try:
        now = Telemetry(run="r", info={}, objectives=["clm"], total_steps=9)
        Telemetry.write(disk, now.model_dump_json())
        append_event(disk, "started")
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        hang = HangWatch(disk, timeout=0)
        while not held_events(disk)["checkpoint_failed"]:  # the last block of the file has room for some
            append_event(disk, "checkpoint_failed", reason="x" * 1000)
        now.step, now.unwritten = 7, dict(held_events(disk))
        Telemetry.write(disk, now.model_dump_json())
        hang.check()
        assert Telemetry.read(disk) == now
        with pytest.raises(WorkerError) as failure:
            hang.check()
        assert failure.value.reason == "hung"
        (disk / "filler").unlink()
        written = len(read_events(disk))
        append_event(disk, "checkpoint_saved")
        assert [event["event"] for event in read_events(disk)[written:]] == ["checkpoint_failed", "checkpoint_saved"]
        assert all(json.loads(line) for line in (disk / "events.jsonl").read_text().splitlines()), "no line is torn"
        assert not held_events(disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def result_of(attempts: list[RunResult], directory: Path, **cluster: int) -> RunResult:
    """How a job ends whose attempts end like these."""
    config = load_config("demo", [f"cluster.{key}={value}" for key, value in cluster.items()])
    progress = Progress(directory, Console(quiet=True))
    return supervise(Run(config, directory, directory, []), StopRequest(), progress, lambda *_: attempts.pop(0))


def test_preemptions_have_a_budget_of_their_own(tmp_path: Path) -> None:
    preempted = [RunResult(step, False, PREEMPTED) for step in (3, 5, 8)]
    result = result_of(preempted, tmp_path, max_preemptions=2, max_failures=0)
    assert (result.step, result.finished) == (8, False)
    assert "cluster.max_preemptions" in str(result.reason)
    assert [event["step"] for event in read_events(tmp_path)] == [3, 5, 8]


def test_a_run_that_ends_as_its_node_is_drained_has_finished(tmp_path: Path) -> None:
    assert result_of([RunResult(9, True, PREEMPTED)], tmp_path) == RunResult(9, True, PREEMPTED)
    assert not read_events(tmp_path)


DEATH = """The actor died unexpectedly before finishing this task.
\tclass_name: Worker
\tactor_id: 02d1a5
\tip: 127.0.0.21
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR."""


class ActorDied(ray.exceptions.ActorDiedError):
    """Ray's error with a text of ours, because Ray makes its text from a message of its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.error_msg = text


def test_rays_account_of_a_death_is_kept_without_its_ids() -> None:
    assert address_in(DEATH) == "127.0.0.21"
    account = rays_account(DEATH)
    assert "its worker process has died" in account and "02d1a5" not in account
    failure = WorkerError("died", 3, "its process ended", "127.0.0.21", account)
    assert all(part in str(failure) for part in ("rank 3 on 127.0.0.21", "its process ended", account))


def test_a_package_that_a_node_lacks_is_a_verdict_at_once() -> None:
    text = 'failed to import on the worker; ip=127.0.0.21\nModuleNotFoundError: No module named "launcher"\n'
    verdict = import_error(ActorDied(text))
    assert verdict and verdict.code == "import-failed"
    assert "127.0.0.21" in str(verdict) and 'No module named "launcher"' in str(verdict)
    assert import_error(ActorDied(DEATH)) is None


def test_workers_that_do_not_start_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.wait", lambda calls, **_: ([], calls))
    monkeypatch.setattr("ray.get", lambda calls: calls)

    def diagnose(*_: object) -> Exception:
        raise AssertionError("no worker has failed")

    with pytest.raises(WorkerError) as failure:
        wait_for_results(["call"], lambda: None, diagnose, patience=0.01)
    assert (failure.value.reason, failure.value.rank) == ("hung", None)


def test_a_signal_outlasts_whatever_else_is_asked() -> None:
    with StopRequest() as stop:
        stop.ask(PREEMPTED)
        assert stop.reason == PREEMPTED
        signal.raise_signal(signal.SIGTERM)
        stop.ask(PREEMPTED)
        stop.clear()
        assert stop.reason == SIGNAL
        with pytest.raises(RunFailedError, match="second signal"):
            signal.raise_signal(signal.SIGTERM)


def test_a_worker_that_sees_another_directory_is_refused(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    config = load_config("demo")
    with claim(here, config), claim(there, config):
        token = token_of(here)
        assert token and token != token_of(there)
        for elsewhere in (there, tmp_path / "nowhere"):
            with pytest.raises(InputError) as refusal:
                Worker().setup(RankAssignment(0, 1, 0, 1, (), 1), elsewhere, token)
            assert (refusal.value.key, refusal.value.code) == ("--output", "output-not-shared")
            assert str(elsewhere) in str(refusal.value)


def test_a_gpu_too_small_is_no_failure_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch.distributed as dist

    def train(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("engine.trainer.train", train)
    worker = Worker(RankAssignment(0, 1, 0, 1, (), 1))
    port = worker.open_store("127.0.0.1")
    try:
        with pytest.raises(InputError) as refusal:
            worker.train(load_config("demo"), tmp_path, "127.0.0.1", port)
    finally:
        dist.destroy_process_group()
    assert (refusal.value.key, refusal.value.code) == ("batch.micro", "gpu-out-of-memory")
    assert "rank 0" in str(refusal.value) and "2.00 GiB" in str(refusal.value)


def test_a_run_directory_in_rays_copy_of_the_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel's test meets Ray's own copy, through `ray job submit`."""
    copy = tmp_path / WORKING_COPIES / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(InputError) as refusal:
        run_job(load_config("demo"), Path("runs/x"))
    assert (refusal.value.key, refusal.value.code) == ("--output", "output-in-working-copy")
    assert not (copy / "runs").exists()


def test_tensor_group_across_nodes_is_refused() -> None:
    nodes = ["10.0.0.1"] * 3 + ["10.0.0.2"]
    check_tensor_groups(nodes, tensor=1)
    with pytest.raises(InputError) as refusal:
        check_tensor_groups(nodes, tensor=2)
    assert refusal.value.key == "parallel.tensor"
    assert all(name in str(refusal.value) for name in ("2 to 3", "10.0.0.1", "10.0.0.2"))


def test_a_run_directory_that_has_gone_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()

    def attempt(*_: object) -> RunResult:
        directory.rmdir()
        raise WorkerError("exception", 0, "FileNotFoundError: telemetry.json")

    run = Run(load_config("demo"), directory, directory, [])
    with pytest.raises(RunFailedError, match=re.escape(str(directory))), failures_recorded(directory):
        supervise(run, StopRequest(), Progress(directory, Console(quiet=True)), attempt)


def test_another_clock_delays_no_growth_for_longer_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, Resized(step=3))
    monkeypatch.setattr("time.time", lambda: 0.0)
    watch = GrowthWatch(tmp_path, [], (), every=300)
    assert watch._next <= time.monotonic() + 300
