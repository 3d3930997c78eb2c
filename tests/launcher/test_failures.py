"""Which failures a run survives."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from pathlib import Path

import pytest

from configs.errors import InputError, RunFailedError
from configs.load import load_config
from launcher import job
from launcher.directory import claim, token_of
from launcher.failures import FailureBudget, HangWatch
from launcher.group import WorkerError, WorkerGroup, _guilt, check_tensor_groups
from launcher.job import run_job
from launcher.stop import PREEMPTED, SIGNAL, StopRequest
from launcher.worker import Ending, Place, Seat, Worker
from monitoring.log import append_event, held_events, read_events
from monitoring.telemetry import Telemetry


def died(rank: int = 0) -> WorkerError:
    return WorkerError("died", rank, "its process ended")


def test_budget_is_spent_and_named() -> None:
    budget = FailureBudget(allowed=2)
    budget.spend(died(), saved=5)
    budget.spend(died(), saved=9)
    with pytest.raises(RunFailedError, match=r"rank 1: .* cluster.max_failures allows 2.* step 12"):
        budget.spend(died(1), saved=12)


def test_an_error_raised_twice_without_a_checkpoint_between_is_not_tried_a_third_time() -> None:
    budget = FailureBudget(allowed=100)
    budget.spend(WorkerError("exception", 0, "RuntimeError: [10.0.0.1:4711] 0x7f01 no"), saved=7)
    with pytest.raises(RunFailedError, match=r"same failure 2 times in a row and no checkpoint.* of step 7\)"):
        budget.spend(WorkerError("exception", 0, "RuntimeError: [10.0.0.1:5122] 0x7f02 no"), saved=7)


def test_progress_between_two_equal_errors_makes_them_two_errors() -> None:
    budget = FailureBudget(allowed=100)
    for step in range(20):
        assert budget.spend(WorkerError("exception", 0, "ValueError: no"), step) == 0


def test_deaths_without_progress_wait_longer_and_end() -> None:
    budget = FailureBudget(allowed=100)
    assert [budget.spend(died(), saved=3), budget.spend(died(), saved=3)] == [0, 1]
    with pytest.raises(RunFailedError, match="same failure 3 times"):
        budget.spend(died(), saved=3)


def test_the_culprit_is_not_who_complains_of_another() -> None:
    peer = WorkerError("exception", 0, "RuntimeError: [10.0.0.2]:5122: Connection closed by peer")
    cause = WorkerError("exception", 1, "ValueError: no")
    assert min([peer, cause], key=lambda failure: _guilt(failure, first_rank=0)) is cause
    assert min([died(2), cause], key=lambda failure: _guilt(failure, first_rank=1)).rank == 2
    assert min([died(0), died(2)], key=lambda failure: _guilt(failure, first_rank=2)).rank == 2


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
        with pytest.raises(WorkerError, match="no step completed"):
            hang.check()
        (disk / "filler").unlink()
        written = len(read_events(disk))
        append_event(disk, "checkpoint_saved")
        assert [event["event"] for event in read_events(disk)[written:]] == ["checkpoint_failed", "checkpoint_saved"]
        assert all(json.loads(line) for line in (disk / "events.jsonl").read_text().splitlines()), "no line is torn"
        assert not held_events(disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def attempts(endings: list[Ending], directory: Path, monkeypatch: pytest.MonkeyPatch, **cluster: int) -> Ending:
    """How a job ends whose attempts end so."""
    monkeypatch.setattr(job, "_attempt", lambda *_: endings.pop(0))
    config = load_config("demo", [f"cluster.{key}={value}" for key, value in cluster.items()])
    return job._attempts(job._Run(config, directory, directory, []), StopRequest(), None)  # type: ignore[arg-type]


def test_preemptions_have_a_budget_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [Ending(step, False, PREEMPTED) for step in (3, 5, 8)]
    ending = attempts(taken, tmp_path, monkeypatch, max_preemptions=2, max_failures=0)
    assert (ending.step, ending.finished) == (8, False)
    assert ending.reason == "preemption 3 and cluster.max_preemptions allows 2"
    assert [event["step"] for event in read_events(tmp_path)] == [3, 5, 8]


def test_a_run_that_ends_as_its_node_is_drained_has_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempts([Ending(9, True, PREEMPTED)], tmp_path, monkeypatch) == Ending(9, True, PREEMPTED)
    assert not read_events(tmp_path)


def test_workers_that_do_not_start_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    group = object.__new__(WorkerGroup)
    group._watch = lambda: None
    monkeypatch.setattr("ray.wait", lambda refs, **_: ([], refs))
    monkeypatch.setattr("ray.get", lambda refs: refs)
    with pytest.raises(WorkerError, match="no answer while it started") as failure:
        group._all(["ref"], patience=0.01)
    assert failure.value.reason == "hung"


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
            with pytest.raises(InputError, match=r"not the same directory on node .* storage all nodes share"):
                Worker().sit(Seat(0, 1, 0, 1, (), 1), elsewhere, token)


def test_a_gpu_too_small_is_no_failure_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch.distributed as dist

    def train(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("engine.trainer.train", train)
    worker = Worker()
    worker._seat = Seat(0, 1, 0, 1, (), 1)
    port = worker.open_store("127.0.0.1")
    try:
        with pytest.raises(
            InputError, match=r"batch\.micro: .*rank 0 .*smaller batch\.micro .*Tried to allocate 2.00 GiB"
        ):
            worker.train(load_config("demo"), tmp_path, "127.0.0.1", port)
    finally:
        dist.destroy_process_group()


def test_a_run_directory_in_rays_copy_of_the_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.runtime_env.packaging import RAY_PKG_PREFIX
    from ray._private.runtime_env.working_dir import WorkingDirPlugin

    copies = Path(WorkingDirPlugin(str(tmp_path), gcs_client=None)._resources_dir)  # where Ray unpacks the job's files
    here = copies / f"{RAY_PKG_PREFIX}0123"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(InputError, match=r"--output \S+/runs/x lies in Ray's copy .* absolute --output"):
        run_job(load_config("demo"), Path("runs/x"))
    assert not (here / "runs").exists()


def test_tensor_group_across_nodes_is_refused() -> None:
    places = [Place("a", "10.0.0.1", ()), Place("a", "10.0.0.1", ()), Place("a", "10.0.0.1", ())]
    places += [Place("b", "10.0.0.2", ())]
    check_tensor_groups(places, tensor=1)
    with pytest.raises(InputError, match=r"ranks 2 to 3 .* 10\.0\.0\.1, 10\.0\.0\.2; .* multiple of 2"):
        check_tensor_groups(places, tensor=2)
