import io
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from rich.console import Console

from configs.errors import InputError
from configs.units import format_count
from monitoring.discovery import serve_targets
from monitoring.events import Failed, Started, State, record
from monitoring.exporter import Exporter
from monitoring.monitor import DirectorySource, EndpointSource, open_source, watch
from monitoring.monitor_view import View, draw, sparkline
from monitoring.run_directory import RunDirectory
from monitoring.run_state import RunState
from monitoring.telemetry import Telemetry, WorkerRecord
from tests.monitoring.synthetic import (
    DIED,
    FAILED,
    FINISHED,
    RESIZED,
    RESUMED,
    STARTED,
    STOPPED,
    drive,
    make_config,
    make_record,
    make_recorder,
)


def state(kind: State, now: Telemetry | None = None) -> RunState:
    return RunState(run="toy", state=kind, telemetry=now, events={}, restarts={})


def shown(target: str) -> str:
    console = Console(file=io.StringIO(), width=100)
    watch(target, prometheus="http://127.0.0.1:9", console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_directory_and_endpoint_show_the_same_run(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 25))
    recorder.checkpoint_saved(24, 0.7, tmp_path / "checkpoints" / "step-00000024")
    record(tmp_path, DIED)
    record(tmp_path, RESUMED)
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:
        recorder.flush()
        texts = [shown(str(tmp_path)), shown(exporter.target), shown(exporter.url), shown(f"http://{exporter.target}/")]
    for text in texts:
        for part in ("toy", "phase 2 of 2: mlm", "step 24 of 30", "4.012", "21.9k tokens", "step 24, ", "1 died"):
            assert part in text, part
        assert "slowest is 1 at" in text
        assert "no Prometheus answers" in text


def test_what_has_ended_is_not_shown_at_work(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    record(tmp_path, STARTED)
    drive(recorder, config, range(1, 9))
    recorder.close()
    assert "8.0" not in shown(str(tmp_path))
    assert "slowest is" in shown(str(tmp_path))
    record(tmp_path, RESIZED)
    assert "none at work" in shown(str(tmp_path))
    for event in (STOPPED, FAILED):
        record(tmp_path, event)
        terminal = Console(file=io.StringIO(), width=100, force_terminal=True)
        watch(str(tmp_path), prometheus="http://127.0.0.1:9", console=terminal)  # returns, for it has ended
        assert event.KIND in shown(str(tmp_path))
    record(tmp_path, RESUMED)
    assert "left" in shown(str(tmp_path))


def test_a_step_long_ago_stands_out(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, config := make_config())
    drive(recorder, config, range(1, 9))
    recorder.close()
    now = Telemetry.read(tmp_path)
    assert now
    cases: list[tuple[int, str, State]] = [(20, "", "running"), (400, "\x1b[33m", "running"), (400, "", "stopped")]
    for age, code, kind in cases:
        console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
        late = now.model_copy(update={"step_time": time.time() - age})
        console.print(draw(View(state(kind, late)), None))
        assert f"{code}{'6 min 40 s' if age == 400 else '20 s'} ago" in console.file.getvalue(), kind  # type: ignore[attr-defined]
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


@pytest.mark.parametrize("end", [View(state("finished")), TimeoutError()])
def test_a_late_answer_is_no_end_but_a_long_silence_is(end: View | Exception) -> None:
    running = View(state("running"))
    source = Script([running, TimeoutError(), running, ConnectionResetError(), end])
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    watch("somewhere", console=console, source=source, refresh_seconds=0.01, silence_seconds=0.5)
    assert source.answers == [end]
    assert ("has not answered" in console.file.getvalue()) == isinstance(end, Exception)  # type: ignore[attr-defined]


def test_the_endpoint_gathers_the_losses_of_the_current_phase(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:
        source, seen = EndpointSource(f"http://{exporter.target}/telemetry.json"), []
        for step in range(1, 25):
            drive(recorder, config, [step])
            recorder.flush()
            seen.append(len(source.read().losses))
    assert seen == [*range(1, 21), 1, 2, 3, 4]


def test_a_run_that_has_not_begun_and_one_that_is_over(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    RunDirectory(tmp_path).telemetry.unlink()
    assert "workers are starting" in shown(str(tmp_path))
    record(tmp_path, Failed(step=0, detail="no disk"))
    assert "the run has failed" in shown(str(tmp_path))
    record(tmp_path, Started(step=0, precision="fp32"))
    drive(recorder, config, range(1, 31))
    recorder.close()
    record(tmp_path, FINISHED)
    over = shown(str(tmp_path))
    assert "finished" in over
    now = Telemetry.read(tmp_path)
    assert now is not None
    average = sum(now.counters.tokens.values()) / now.counters.step_seconds.sum
    assert f"{format_count(average)} tokens/s" in over


@pytest.mark.parametrize(
    ("target", "code"),
    [("no/such/run", "not-a-run"), (".", "not-a-run"), ("http://127.0.0.1:9", "run-unreachable")],
)
def test_what_is_no_run_is_bad_input(target: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        watch(target)
    assert error.value.code == code


def test_a_page_that_is_no_metrics_endpoint_is_bad_input(tmp_path: Path) -> None:
    server = serve_targets(tmp_path, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(InputError) as error:
        watch(f"http://127.0.0.1:{server.server_port}")
    assert error.value.code == "not-a-run"
    server.shutdown()
    server.server_close()


def test_an_exporter_of_an_older_version_is_one_clear_error() -> None:
    """Prometheus' client answers every path with the metrics, as exporters did before they served their state."""
    registry = CollectorRegistry()
    Gauge("detour_train_step", "Completed optimizer steps", ["run"], registry=registry).labels("toy").set(1)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    with pytest.raises(InputError, match="older version") as error:
        watch(f"127.0.0.1:{server.server_port}")
    assert error.value.code == "not-a-run"
    server.shutdown()
    server.server_close()
    thread.join()


def test_targets_are_told_apart(tmp_path: Path) -> None:
    RunDirectory(tmp_path).config.touch()
    assert isinstance(open_source(str(tmp_path)), DirectorySource)
    for url in ("head:9464", "http://head:9464", "http://head:9464/metrics", "http://head:9464/telemetry.json"):
        assert open_source(url) == EndpointSource("http://head:9464/telemetry.json")


def test_a_sparkline_falls_with_its_values() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(x) for x in range(1000)], 20)) == 20
