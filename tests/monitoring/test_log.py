import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from monitoring.log import (
    Follower,
    LineWriter,
    append_event,
    read_events,
    read_metrics,
    rewind_metrics,
)
from monitoring.run_directory import RunDirectory

METRICS, EVENTS = RunDirectory(Path()).metrics.name, RunDirectory(Path()).events.name


LINE = dict.fromkeys(("phase", "objective", "loss", "tokens", "learning_rate", "grad_norm", "packing_ratio"), 1.5)
LINE |= dict.fromkeys(("step_seconds", "data_wait_seconds", "tokens_per_second", "mfu"), 1.5)


def write_steps(directory: Path, steps: range) -> None:
    writer = LineWriter(directory / METRICS)
    for step in steps:
        writer.append({**LINE, "step": step, "loss": step / 3})
    writer.close()


def test_lines_come_back_exactly_and_not_finite_numbers_are_null(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / METRICS)
    records: list[dict[str, Any]] = [
        {**LINE, "step": 1, "loss": 0.1 + 0.2},
        {**LINE, "step": 2, "loss": float("nan")},
        {**LINE, "step": 3, "loss": float("inf")},
    ]
    records.append({**LINE, "step": 4, "eval_loss": {"clm": float("nan"), "mlm": 2.5}})
    for record in records:
        writer.append(record)
    writer.close()
    after = {"eval_loss": {"clm": None, "mlm": 2.5}}
    nulls = [records[0], records[1] | {"loss": None}, records[2] | {"loss": None}, records[3] | after]
    assert read_metrics(tmp_path) == nulls


@pytest.mark.parametrize("torn", [b'{"step": 11, "lo', b'{"step": 11, "loss": 3}', b"\n", b"\x00\x00"])
def test_rewind_cuts_later_steps_and_a_torn_last_line(tmp_path: Path, torn: bytes) -> None:
    write_steps(tmp_path, range(1, 11))
    with (tmp_path / METRICS).open("ab") as file:
        file.write(torn)
    rewind_metrics(tmp_path, 10)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 11))
    rewind_metrics(tmp_path, 7)
    write_steps(tmp_path, range(8, 10))
    lines = (tmp_path / METRICS).read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))


def test_a_damaged_line_costs_no_other_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_steps(tmp_path, range(1, 6))
    path = tmp_path / METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"{", b"\x00"), *lines[3:]]))
    rewind_metrics(tmp_path, 4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 4]
    assert f"{path}: 1 damaged line is not used" in caplog.text


def test_lines_that_no_program_can_use_are_left_out(tmp_path: Path) -> None:
    append_event(tmp_path, "started", step=0)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{}\n{"event": "saved"}\n{"event": "saved", "time": "yesterday"}\n[]\n')
        file.write('{"event": "saved", "time": "2026-11-28T10:00:00"}\n')
    append_event(tmp_path, "finished", step=9)
    assert [event["event"] for event in read_events(tmp_path)] == ["started", "finished"]
    good = {**LINE, "step": 1}
    bad = (
        {},
        good | {"step": "1"},
        {"step": 1, "loss": 2.5},
        good | {"step": True},
        good | {"loss": float("nan")},
        [1],
    )
    (tmp_path / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in (*bad, good)))
    assert read_metrics(tmp_path) == [good]


def test_rewind_of_a_run_without_lines_is_nothing(tmp_path: Path) -> None:
    rewind_metrics(tmp_path, 0)
    assert not (tmp_path / METRICS).exists()


def test_events_carry_a_time_with_zone_and_follow_a_torn_line(tmp_path: Path) -> None:
    follower = Follower(tmp_path / EVENTS)
    assert follower.read() == []
    append_event(tmp_path, "started", nodes=2)
    assert len(follower.read()) == 1
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(b'{"time": "2026')
    assert len(follower.read()) == 1
    append_event(tmp_path, "worker_failed", reason="killé", loss=float("inf"))
    assert follower.read() == read_events(tmp_path)
    started, failed = read_events(tmp_path)
    assert datetime.fromisoformat(started.pop("time")).tzinfo is not None
    assert started == {"event": "started", "nodes": 2}
    assert (failed["reason"], failed["loss"]) == ("killé", None)


def test_threads_that_follow_a_file_at_once_see_each_line_once(tmp_path: Path) -> None:
    """The exporter answers each scrape in a thread of its own."""
    follower = Follower(tmp_path / METRICS)

    def follow(thread: int) -> None:
        while len(follower.read()) < 300:
            pass

    with ThreadPoolExecutor(5) as threads:
        following = [threads.submit(follow, index) for index in range(4)]
        threads.submit(write_steps, tmp_path, range(300))
        for one in following:
            one.result(timeout=60)
    follower.read().clear()
    write_steps(tmp_path, range(300, 301))
    assert [line["step"] for line in follower.read()] == list(range(301))


def test_a_follower_reads_a_file_anew_that_was_cut_back_and_waits_for_one_it_cannot_read(tmp_path: Path) -> None:
    follower = Follower(tmp_path / METRICS)
    write_steps(tmp_path, range(1, 11))
    assert len(follower.read()) == 10
    rewind_metrics(tmp_path, 4)
    assert [line["step"] for line in follower.read()] == [1, 2, 3, 4]
    moved = (tmp_path / METRICS).rename(tmp_path / "moved")
    (tmp_path / METRICS).mkdir()
    assert len(follower.read()) == 4
    assert read_metrics(tmp_path) == []
    (tmp_path / METRICS).rmdir()
    moved.rename(tmp_path / METRICS)
    write_steps(tmp_path, range(5, 6))
    assert [line["step"] for line in follower.read()] == [1, 2, 3, 4, 5]


def _append_many(directory: Path, writer: int) -> None:
    for number in range(200):
        append_event(directory, "checkpoint_saved", writer=writer, number=number, path="x" * 500)


def test_events_of_several_processes_never_mix(tmp_path: Path) -> None:
    (tmp_path / EVENTS).touch()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, index)) for index in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    numbers = [(event["writer"], event["number"]) for event in read_events(tmp_path)]
    assert sorted(numbers) == [(writer, number) for writer in range(3) for number in range(200)]


def test_a_full_disk_holds_lines_back_and_loses_none() -> None:
    """/dev/full is a real full disk; the file descriptor then gets room by being pointed at a real file."""
    writer = LineWriter(Path("/dev/full"))
    writer.append({"step": 1})
    writer.append({"step": 2})
    reader, room = os.pipe()
    (opened,) = [
        int(link.name)
        for link in Path("/proc/self/fd").iterdir()
        if link.is_char_device() and link.samefile("/dev/full")
    ]
    os.dup2(room, opened)
    writer.append({"step": 3})
    assert os.read(reader, 1000) == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    writer.close()
    os.close(reader)
    os.close(room)
