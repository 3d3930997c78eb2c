import io
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import InputError
from configs.units import format_count
from monitoring import live
from monitoring.discovery import serve_targets
from monitoring.exporter import Exporter
from monitoring.live import DirectorySource, EndpointSource, open_source, watch
from monitoring.log import append_event
from monitoring.screen import View, screen, sparkline
from monitoring.telemetry import Telemetry, WorkerRecord
from tests.monitoring.synthetic import drive, make_config, make_record, make_recorder


def shown(target: str, **changes: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    watch(target, prometheus="http://127.0.0.1:9", console=console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_directory_and_endpoint_show_the_same_run(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 25))
    recorder.checkpoint_saved(24, 0.7, tmp_path / "checkpoints" / "step-00000024")
    append_event(tmp_path, "worker_failed", reason="killed")
    append_event(tmp_path, "resumed")
    with Exporter(tmp_path, "toy", "127.0.0.1", 9464) as exporter:
        recorder.flush()
        texts = [shown(str(tmp_path)), shown(exporter.target), shown(exporter.url), shown(f"http://{exporter.target}/")]
    for text in texts:
        for part in ("toy", "phase 2 of 2: mlm", "step 24 of 30", "4.012", "21.9k tokens", "step 24, ", "1 killed"):
            assert part in text, part
        assert "slowest is 1 at" in text
        assert "no Prometheus answers" in text


def test_what_has_ended_is_not_shown_at_work(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    append_event(tmp_path, "started")
    drive(recorder, config, range(1, 9))
    recorder.close()
    assert "8.0" not in shown(str(tmp_path))
    assert "slowest is" in shown(str(tmp_path))
    append_event(tmp_path, "resized")
    assert "none at work" in shown(str(tmp_path))
    for kind in ("stopped", "failed"):
        append_event(tmp_path, kind)
        terminal = Console(file=io.StringIO(), width=100, force_terminal=True)
        watch(str(tmp_path), prometheus="http://127.0.0.1:9", console=terminal)  # returns, for it has ended
        assert kind in shown(str(tmp_path))
    append_event(tmp_path, "resumed")
    assert "left" in shown(str(tmp_path))


def test_a_step_long_ago_stands_out(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, config := make_config())
    drive(recorder, config, range(1, 9))
    recorder.close()
    now = Telemetry.read(tmp_path)
    assert now
    for age, code, state in ((20, "", "running"), (400, "\x1b[33m", "running"), (400, "", "stopped")):
        console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
        late = now.model_copy(update={"step_time": time.time() - age})
        console.print(screen(View(late, {}, [], state), None))  # type: ignore[arg-type]
        assert f"{code}{'6 min 40 s' if age == 400 else '20 s'} ago" in console.file.getvalue(), state  # type: ignore[attr-defined]
        assert ("\x1b[33m6 min" in console.file.getvalue()) == bool(code)  # type: ignore[attr-defined]


def test_the_slower_of_two_ranks_is_told_from_the_other(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, config := make_config())
    recorder.step(make_record(config, 1, workers=[WorkerRecord(0, 2.0, 1), WorkerRecord(1, 3.0, 1)]))
    recorder.close()
    assert "slowest is 1 at 1.50x the other" in shown(str(tmp_path))


@dataclass
class Script:
    """A source that gives one after the other; the last for ever."""

    answers: list[View | Exception]

    def read(self) -> View:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("end", [View(None, {}, [], "finished"), TimeoutError()])
def test_a_late_answer_is_no_end_but_a_long_silence_is(monkeypatch: pytest.MonkeyPatch, end: View | Exception) -> None:
    running = View(None, {}, [])
    source = Script([running, TimeoutError(), running, ConnectionResetError(), end])
    monkeypatch.setattr(live, "open_source", lambda target: source)
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(live, "SILENCE_SECONDS", 0.5)
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    watch("somewhere", console=console)
    assert source.answers == [end]
    assert ("has not answered" in console.file.getvalue()) == isinstance(end, Exception)  # type: ignore[attr-defined]


def test_the_endpoint_gathers_the_losses_of_the_current_phase(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    with Exporter(tmp_path, "toy", "127.0.0.1", 9464) as exporter:
        source, seen = EndpointSource(exporter.url), []
        for step in range(1, 25):
            drive(recorder, config, [step])
            recorder.flush()
            seen.append(len(source.read().losses))
    assert seen == [*range(1, 21), 1, 2, 3, 4]


def test_a_run_that_has_not_begun_and_one_that_is_over(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    (tmp_path / "telemetry.json").unlink()
    assert "workers are starting" in shown(str(tmp_path))
    drive(recorder, config, range(1, 31))
    recorder.close()
    append_event(tmp_path, "finished")
    over = shown(str(tmp_path))
    assert "finished" in over
    now = Telemetry.read(tmp_path)
    assert now is not None
    average = sum(now.counters.tokens.values()) / now.counters.step_seconds.sum
    assert f"{format_count(average)} tokens/s" in over


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no/such/run", "neither a run directory nor a metrics URL"),
        (".", "not a run directory"),
        ("http://127.0.0.1:9", "no answer"),
    ],
)
def test_what_is_no_run_is_bad_input(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        watch(target)


def test_a_page_that_is_no_metrics_endpoint_is_bad_input(tmp_path: Path) -> None:
    server = serve_targets(tmp_path, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(InputError, match="not as a run's metrics endpoint"):
        watch(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_targets_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert isinstance(open_source(str(tmp_path)), DirectorySource)
    assert open_source("head:9464") == EndpointSource("http://head:9464/metrics")
    assert open_source("http://head:9464") == EndpointSource("http://head:9464/metrics")


def test_a_sparkline_falls_with_its_values() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(x) for x in range(1000)], 20)) == 20
