import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from monitoring.log import read_metrics
from monitoring.writers import Writers
from tests.monitoring.prometheus import wait_until
from tests.monitoring.synthetic import drive, make_config, make_recorder


def test_tensorboard_holds_the_lines_and_a_resumed_run_repeats_none(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(monitoring={"every": "4 steps", "writers": ["tensorboard"]})
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 9))
    state = recorder.state()
    drive(recorder, config, range(9, 17))
    recorder.close()
    resumed = make_recorder(tmp_path, config, state, 8)
    drive(resumed, config, range(9, 31))
    resumed.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for objective in ("clm", "mlm"):
        ours = [(line["step"], line["loss"]) for line in read_metrics(tmp_path) if line["objective"] == objective]
        theirs = [(event.step, event.value) for event in events.Scalars(f"loss/{objective}")]
        assert [step for step, _ in theirs] == [step for step, _ in ours]
        assert [value for _, value in theirs] == pytest.approx([value for _, value in ours], rel=1e-6)


def test_wandb_takes_the_lines_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = make_config(monitoring={"every": "4 steps", "writers": ["wandb"]})
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 31))
    recorder.close()
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    tags = (b"loss/clm", b"loss/mlm", b"eval_loss/mlm")
    wait_until(lambda: all(tag in written.read_bytes() for tag in tags), 30)  # wandb's own process writes the file


class Broken:
    """Fails at its second line."""

    def __init__(self, config: object, directory: Path, step: int) -> None:
        self.lines = 0

    def write(self, line: object) -> None:
        self.lines += 1
        if self.lines > 1:
            raise ConnectionError("no route to the server")

    def close(self) -> None:
        raise AssertionError("it was dropped before")


class Refused(Broken):
    """Fails when it is made."""

    def __init__(self, config: object, directory: Path, step: int) -> None:
        raise PermissionError("no account")


def test_a_writer_that_fails_is_dropped_with_one_warning_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(monitoring={"every": "4 steps", "writers": ["tensorboard", "wandb"]})
    writers = Writers(config, tmp_path, 0, {"tensorboard": Broken, "wandb": Refused})
    for step in range(1, 9):
        writers.write({"step": step})
    writers.close()
    assert [record.args[0] for record in caplog.records] == ["wandb", "tensorboard"]  # type: ignore[index]


def test_a_missing_package_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(monitoring={"every": "4 steps", "writers": ["wandb"]})
    with pytest.raises(InputError, match=r"detour-train\[wandb\]") as error:
        make_recorder(tmp_path, config)
    assert error.value.key == "monitoring.writers"


def test_no_tracking_tool_is_imported_unasked() -> None:
    code = "import sys, monitoring.recorder; assert not {'wandb', 'tensorboardX'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": "."})
