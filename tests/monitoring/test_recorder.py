import errno
import json
import math
from pathlib import Path

import pytest

from monitoring import telemetry
from monitoring.events import WorkersStarted, record
from monitoring.log import read_events, read_metrics
from monitoring.recorder import Recorder, due
from monitoring.run_directory import RunDirectory
from monitoring.telemetry import Telemetry
from tests.monitoring.synthetic import drive, make_config, make_record, make_recorder

KEYS = [
    *("step", "phase", "objective", "loss", "bits_per_byte", "tokens", "learning_rate", "grad_norm", "packing_ratio"),
    "clipped_share",
    *("step_seconds", "data_wait_seconds", "tokens_per_second", "mfu"),
]
HELD_OUT = ["eval_loss", "eval_accuracy", "eval_bits_per_byte"]


def test_due_steps_are_every_nth_and_the_last() -> None:
    config = make_config()
    assert [step for step in range(1, 31) if due(config, step)] == [4, 8, 12, 16, 20, 24, 28, 30]


def test_a_line_holds_the_step_itself_and_means_since_the_line_before(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 31))
    recorder.close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24, 28, 30]
    keys = [[*KEYS, *HELD_OUT * (line["step"] == 20), "gradient_norms"] for line in lines]
    assert [list(line) for line in lines] == keys

    steps = [make_record(config, step) for step in range(1, 31)]
    window, line = steps[20:24], lines[5]
    seconds = sum(step.step_seconds for step in window)
    assert (line["phase"], line["objective"], line["loss"]) == (1, "mlm", steps[23].loss)
    assert line["tokens"] == sum(step.tokens for step in steps[:24])
    assert line["step_seconds"] == pytest.approx(seconds / 4)
    assert line["tokens_per_second"] == pytest.approx(sum(step.tokens for step in window) / seconds)
    assert line["mfu"] == pytest.approx(4e9 / (seconds * 2 * 1e11))
    assert line["data_wait_seconds"] == pytest.approx(0.002)
    assert lines[-1]["step_seconds"] == pytest.approx((steps[28].step_seconds + steps[29].step_seconds) / 2)


@pytest.mark.parametrize("saved", [0, 8, 11, 20, 29])
def test_a_resumed_run_writes_the_same_bytes_as_an_undisturbed_one(tmp_path: Path, saved: int) -> None:
    config = make_config()
    straight = make_recorder(tmp_path / "straight", config)
    drive(straight, config, range(1, 31))
    straight.close()

    first = make_recorder(tmp_path / "broken", config)
    drive(first, config, range(1, saved + 1))
    state = json.loads(json.dumps(first.state())) if saved else None
    drive(first, config, range(saved + 1, min(saved + 7, 30)))
    with RunDirectory(tmp_path / "broken").metrics.open("ab") as file:
        file.write(b'{"step": 3')
    second = make_recorder(tmp_path / "broken", config, state, saved)
    drive(second, config, range(saved + 1, 31))
    second.close()

    ours, theirs = (RunDirectory(tmp_path / name).metrics.read_bytes() for name in ("broken", "straight"))
    assert ours == theirs
    ended = [Telemetry.read(tmp_path / name) for name in ("broken", "straight")]
    assert ended[0] is not None
    assert ended[1] is not None
    assert ended[0].counters.tokens == ended[1].counters.tokens
    assert ended[0].counters.step_seconds.count == 30


def test_a_run_begun_with_other_buckets_goes_on_with_them(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 9))
    state = recorder.state()
    state["counters"]["step_seconds"] |= {"bounds": [0.1, 0.215, 1.0], "counts": [0, 3, 8]}
    resumed = make_recorder(tmp_path, config, state, 8)
    drive(resumed, config, range(9, 31))
    resumed.close()
    now = Telemetry.read(tmp_path)
    assert now
    steps = now.counters.step_seconds
    assert (steps.bounds, steps.counts, steps.count) == ((0.1, 0.215, 1.0), [0, 12, 30], 30)


def test_the_nodes_of_an_elastic_run_are_those_it_has(tmp_path: Path) -> None:
    config = make_config(cluster={"nodes": [2, 8]})

    def nodes() -> object:
        Recorder(tmp_path, config, {}, devices=2, peak_flops=0, state=None, step=0).close()
        now = Telemetry.read(tmp_path)
        return now and now.info["nodes"]

    assert nodes() == 8
    record(tmp_path, WorkersStarted(workers=["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3"], seconds=1.0))
    assert nodes() == 3


def test_telemetry_shows_the_latest_state(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    assert (now := Telemetry.read(tmp_path))
    assert (now.step, now.total_steps, now.tokens_per_second) == (0, 30, 0.0)
    drive(recorder, config, range(1, 25))
    recorder.checkpoint_saved(24, 0.7, tmp_path / "checkpoints" / "step-00000024")
    now = Telemetry.read(tmp_path)
    assert now
    assert (now.step, now.phase, now.objective, now.checkpoint_step) == (24, 1, "mlm", 24)
    assert now.loss == {"clm": make_record(config, 20).loss, "mlm": make_record(config, 24).loss}
    assert [worker.rank for worker in now.workers] == [0, 1]
    assert now.counters.checkpoint_seconds.count == 1
    event = read_events(tmp_path)[-1]
    assert (event["event"], event["step"], event["path"]) == ("checkpoint_saved", 24, "checkpoints/step-00000024")


def test_a_phase_begun_again_after_a_rollback_is_one_event(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    recorder.phase_started(0, "clm", 0)
    drive(recorder, config, range(1, 21))
    recorder.phase_started(1, "mlm", 20)
    again = make_recorder(tmp_path, config, None, 0)
    again.phase_started(0, "clm", 0)
    drive(again, config, range(1, 21))
    again.phase_started(1, "mlm", 20)
    started = [(event["phase"], event["step"]) for event in read_events(tmp_path) if event["event"] == "phase_started"]
    assert started == [(0, 0), (1, 20)]


def test_a_branch_within_a_phase_records_no_beginning_of_it(tmp_path: Path) -> None:
    make_recorder(tmp_path, make_config(), None, 5).phase_started(0, "clm", 5)
    assert not [event for event in read_events(tmp_path) if event["event"] == "phase_started"]


def test_a_loss_that_is_not_finite_is_null_in_the_log_and_nan_in_telemetry(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 4))
    recorder.step(make_record(config, 4, loss=math.inf, grad_norm=math.nan))
    recorder.close()
    line, now = read_metrics(tmp_path)[0], Telemetry.read(tmp_path)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert now
    assert math.isnan(now.loss["clm"])
    assert math.isnan(now.grad_norm)


@pytest.mark.parametrize("saved", [None, 22])
def test_the_share_of_clipped_steps_is_that_of_the_phase(tmp_path: Path, saved: int | None) -> None:
    """Clipped: odd steps of the first phase, every fourth of the second. A resume neither loses nor repeats a step."""
    config = make_config(monitoring={"every": "1 steps"}, optimizer={"clip": 0.5})

    def advance(recorder: Recorder, steps: range) -> None:
        for step in steps:
            clipped = step % 4 == 0 if step > 20 else step % 2 == 1
            recorder.step(make_record(config, step, grad_norm=math.inf if step == 7 else 0.5 + 0.1 * clipped))

    recorder = make_recorder(tmp_path, config)
    advance(recorder, range(1, 25))
    if saved:
        before = make_recorder(tmp_path / "saved", config)
        advance(before, range(1, saved + 1))
        recorder = make_recorder(tmp_path, config, json.loads(json.dumps(before.state())), saved)
        advance(recorder, range(saved + 1, 25))
    recorder.close()
    shares = {line["step"]: line["clipped_share"] for line in read_metrics(tmp_path)}
    assert [shares[step] for step in (1, 2, 7, 20, 21, 24)] == pytest.approx([1, 1 / 2, 3 / 7, 9 / 20, 0, 1 / 4])
    now = Telemetry.read(tmp_path)
    assert now
    assert now.counters.clipped_shares() == {"0": 9 / 20, "1": 1 / 4}


def test_without_clipping_there_is_no_share(tmp_path: Path) -> None:
    config = make_config(optimizer={"clip": 0.0})
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 5))
    recorder.close()
    assert "clipped_share" not in read_metrics(tmp_path)[0]


def test_an_unknown_peak_gives_no_mfu(tmp_path: Path) -> None:
    config = make_config()
    recorder = Recorder(tmp_path, config, {}, devices=2, peak_flops=0, state=None, step=0)
    drive(recorder, config, range(1, 5))
    recorder.close()
    assert read_metrics(tmp_path)[0]["mfu"] is None


def test_on_a_full_disk_telemetry_is_written_over_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = make_recorder(tmp_path, config := make_config())
    drive(recorder, config, range(1, 9))
    recorder.close()
    now, path = Telemetry.read(tmp_path), RunDirectory(tmp_path).telemetry
    assert now
    before = path.stat()

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(telemetry, "write_atomically", refuse)
    Telemetry.write(tmp_path, now.model_copy(update={"step": 9}).model_dump_json())
    after, latest = path.stat(), Telemetry.read(tmp_path)
    assert latest
    assert (latest.step, after.st_ino, after.st_size) == (9, before.st_ino, before.st_size)
    assert after.st_mtime_ns > before.st_mtime_ns
