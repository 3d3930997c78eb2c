import io
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import InputError
from monitoring.exporter import Exporter
from monitoring.live import DirectorySource, EndpointSource, open_source, watch
from monitoring.log import append_event
from monitoring.screen import sparkline
from tests.monitoring.synthetic import drive, make_config, make_recorder


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
    with Exporter(tmp_path, "toy", "127.0.0.1", 9464) as exporter:
        recorder.flush()
        texts = [shown(str(tmp_path)), shown(exporter.target), shown(exporter.url), shown(f"http://{exporter.target}/")]
    for text in texts:
        for part in ("toy", "phase 2 of 2: mlm", "step 24 of 30", "4.012", "21.9k tokens", "step 24, ", "1 killed"):
            assert part in text, part
        assert "slowest is 1 at" in text
        assert "no Prometheus answers" in text


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
    assert "finished" in shown(str(tmp_path))


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


def test_targets_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert isinstance(open_source(str(tmp_path)), DirectorySource)
    assert open_source("head:9464") == EndpointSource("http://head:9464/metrics")
    assert open_source("http://head:9464") == EndpointSource("http://head:9464/metrics")


def test_a_sparkline_falls_with_its_values() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(x) for x in range(1000)], 20)) == 20
