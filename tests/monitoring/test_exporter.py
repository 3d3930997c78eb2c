import socket
import threading
import time
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from configs.errors import InputError
from monitoring.events import REASONS, WorkersStarted, record
from monitoring.exporter import Exporter
from monitoring.run_directory import RunDirectory
from monitoring.run_state import RunState
from monitoring.telemetry import Telemetry
from tests.monitoring.synthetic import DIED, FINISHED, STARTED, drive, make_config, make_recorder

ENDPOINT = {
    "detour_train_loss": ("gauge", {"objective"}),
    "detour_train_tokens_total": ("counter", {"objective"}),
    "detour_train_step": ("gauge", set()),
    "detour_train_tokens_per_second": ("gauge", set()),
    "detour_train_tokens_per_second_per_device": ("gauge", set()),
    "detour_train_mfu_ratio": ("gauge", set()),
    "detour_train_step_seconds": ("histogram", set()),
    "detour_train_data_wait_seconds_total": ("counter", set()),
    "detour_train_learning_rate": ("gauge", set()),
    "detour_train_grad_norm": ("gauge", set()),
    "detour_train_layer_gradient_norm": ("gauge", {"objective", "layer"}),
    "detour_train_clipped_ratio": ("gauge", {"phase", "objective"}),
    "detour_train_phase": ("gauge", {"phase", "objective"}),
    "detour_data_packing_ratio": ("gauge", set()),
    "detour_data_epoch": ("gauge", {"source"}),
    "detour_checkpoint_seconds": ("histogram", set()),
    "detour_checkpoint_step": ("gauge", set()),
    "detour_launcher_restarts_total": ("counter", {"reason"}),
    "detour_worker_step_seconds": ("gauge", {"rank", "node"}),
    "detour_worker_memory_bytes": ("gauge", {"rank", "node"}),
    "detour_train_bits_per_byte": ("gauge", {"objective"}),
    "detour_eval_loss": ("gauge", {"objective"}),
    "detour_eval_bits_per_byte": ("gauge", {"objective"}),
    "detour_eval_accuracy_ratio": ("gauge", {"objective"}),
    "detour_data_tokens_total": ("counter", {"source"}),
    "detour_data_documents_total": ("counter", {"source"}),
    "detour_data_skipped_documents_total": ("counter", {"source"}),
    "detour_run_resume_timestamp_seconds": ("gauge", set()),
    "detour_run_state": ("gauge", {"state"}),
    "detour_clock_seconds": ("gauge", set()),
    "detour_run_info": ("gauge", {"directory", "model", "phases", "precision", "nodes", "workers"}),
}


def scrape(exporter: Exporter) -> dict[str, tuple[str, list[Sample]]]:
    with urlopen(exporter.url) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    result = {}
    for family in families:
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        result[family.name + "_total" * (family.type == "counter")] = (family.type, samples)
    return result


def values(exporter: Exporter, name: str) -> dict[str, float]:
    """Value by the label that is not `run`; the empty string where there is none."""
    _, samples = scrape(exporter)[name]
    return {
        "".join(v for k, v in sample.labels.items() if k not in ("run", "id", "le")): sample.value for sample in samples
    }


def test_every_contract_metric_has_its_type_and_labels(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 25))
    recorder.checkpoint_saved(24, 0.7, tmp_path / "checkpoints" / "step-00000024")
    record(tmp_path, DIED)
    drive(recorder, config, range(25, 31))
    recorder.close()
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:
        found = scrape(exporter)
        for name, (kind, labels) in ENDPOINT.items():
            assert found[name][0] == kind, name
            assert found[name][1], name
            for sample in found[name][1]:
                assert sample.labels["run"] == "toy"
                assert sample.labels.keys() - {"run", "id", "le"} == labels, name
        assert values(exporter, "detour_train_phase") == {"clm0": 0, "mlm1": 1}
        assert values(exporter, "detour_worker_memory_bytes") == {"0": 1e9, "1": 1e9 + 1}
        assert values(exporter, "detour_launcher_restarts_total") == dict.fromkeys(REASONS, 0) | {"died": 1}
        assert values(exporter, "detour_train_step") == {"": 30}
        steps = {s.labels.get("le", s.name): s.value for s in found["detour_train_step_seconds"][1]}
        assert steps["detour_train_step_seconds_count"] == steps["+Inf"] == 30
        assert steps["detour_train_step_seconds_sum"] == pytest.approx(30 * 0.22)
        bounds = [float(bound) for bound in steps if bound[0].isdigit()]
        assert (bounds[0], bounds[-1]) == (0.01, 300)
        assert all(1.2 < b / a < 1.3 for a, b in pairwise(bounds)), "a quantile is within a quarter"
        taken = [0.2 + 0.01 * (step % 5) for step in range(1, 31)]
        for bound in bounds:
            assert steps[str(bound)] == sum(seconds <= bound for seconds in taken), bound


def test_the_endpoint_answers_before_the_first_step_and_tells_when_nobody_works(tmp_path: Path) -> None:
    config = make_config()
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:
        early = {"detour_run_info", "detour_launcher_restarts_total", "detour_events_total"}
        early |= {"detour_run_state", "detour_clock_seconds"}
        assert scrape(exporter).keys() == early
        recorder = make_recorder(tmp_path, config)
        drive(recorder, config, range(1, 9))
        recorder.close()
        assert values(exporter, "detour_worker_step_seconds").keys() == {"0", "1"}
        assert values(exporter, "detour_train_tokens_per_second")[""] > 0
        record(tmp_path, DIED)
        assert scrape(exporter)["detour_worker_step_seconds"][1] == []
        assert values(exporter, "detour_train_tokens_per_second") == {"": 0}
        smaller = make_recorder(tmp_path, config, None, 0)
        drive(smaller, config, range(1, 5), ranks=1)
        smaller.close()
        assert values(exporter, "detour_worker_step_seconds").keys() == {"0"}


def test_what_cannot_be_read_for_a_while_is_no_gap(tmp_path: Path) -> None:
    """A directory in a file's place is an OSError, as a stale file of a network disk is."""
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 9))
    recorder.close()
    record(tmp_path, STARTED)
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:
        assert values(exporter, "detour_train_step") == {"": 8}
        files = RunDirectory(tmp_path)
        files.telemetry.write_text('{"step": 9')
        assert values(exporter, "detour_train_step") == {"": 8}
        for path in (files.telemetry, files.events):
            path.unlink()
            path.mkdir()
        assert Telemetry.read(tmp_path) is None
        assert values(exporter, "detour_train_step") == {"": 8}
        assert values(exporter, "detour_events_total")["started"] == 1


def test_counters_never_fall_across_a_rollback(tmp_path: Path) -> None:
    config = make_config()
    counters = [name for name, (kind, _) in ENDPOINT.items() if kind in ("counter", "histogram")]
    seen: dict[tuple[str, str], float] = {}
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:

        def check() -> None:
            found = scrape(exporter)
            for name in counters:
                for sample in found[name][1]:
                    key = (sample.name, str(sorted(sample.labels.items())))
                    assert sample.value >= seen.get(key, 0), key
                    seen[key] = sample.value

        recorder = make_recorder(tmp_path, config)
        drive(recorder, config, range(1, 9))
        state = recorder.state()
        recorder.checkpoint_saved(8, 0.5, tmp_path / "checkpoints" / "step-00000008")
        check()
        drive(recorder, config, range(9, 23))
        recorder.close()
        check()
        record(tmp_path, DIED)
        resumed = make_recorder(tmp_path, config, state, 8)
        check()
        assert values(exporter, "detour_train_step") == {"": 8}
        for step in range(9, 31):
            drive(resumed, config, [step])
            resumed.flush()
            check()
        tokens = values(exporter, "detour_train_tokens_total")
        assert sum(tokens.values()) == sum(900 + step for step in range(1, 31))


def test_a_busy_port_gives_the_next_one_and_closing_frees_it(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with Exporter(tmp_path, "one", "127.0.0.1", port) as one, Exporter(tmp_path, "two", "127.0.0.1", port) as two:
            assert port < one.port < two.port
            assert one.url == f"http://127.0.0.1:{one.port}/metrics"
            assert {s.labels["run"] for s in scrape(two)["detour_run_info"][1]} == {"two"}
    with Exporter(tmp_path, "again", "127.0.0.1", port) as again:
        assert again.port == port


def test_an_address_of_another_machine_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"192\.0\.2\.1:9464") as error:
        Exporter(tmp_path, "toy", "192.0.2.1", 9464)
    assert error.value.key == "monitoring.address"


def test_the_state_is_served_beside_the_metrics(tmp_path: Path) -> None:
    config = make_config()
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:

        def state() -> RunState:
            with urlopen(f"http://{exporter.target}/telemetry.json") as answer:
                assert answer.headers["Content-Type"] == "application/json"
                return RunState.model_validate_json(answer.read())

        early = state()
        assert (early.run, early.state, early.telemetry) == ("toy", "not_started", None)
        record(tmp_path, STARTED)
        recorder = make_recorder(tmp_path, config)
        drive(recorder, config, range(1, 9))
        recorder.close()
        now = state()
        assert now.telemetry
        read = Telemetry.read(tmp_path)
        assert read
        assert now.telemetry.model_dump_json() == read.model_dump_json()
        assert (now.state, now.events["started"], now.restarts["died"]) == ("running", 1, 0)
        record(tmp_path, DIED)
        now = state()
        assert (now.state, now.restarts["died"]) == ("running", 1)
        assert now.telemetry
        assert now.telemetry.workers == []


@pytest.mark.parametrize("ahead", [0, 3600.0, -3600.0])
def test_a_worker_whose_clock_differs_distorts_no_time(tmp_path: Path, ahead: float) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 3))
    recorder.close()
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:
        first = Telemetry.read(tmp_path)
        assert first
        later = first.model_copy(update={"time": time.time() + ahead, "step_time": time.time() - 5 + ahead})
        Telemetry.write(tmp_path, later.model_dump_json())
        now = values(exporter, "detour_clock_seconds")[""]
        age = now - values(exporter, "detour_train_step_timestamp_seconds")[""]
    assert 3 <= age <= 12
    assert abs(now - time.time()) < 60


def test_ranks_are_labelled_with_their_nodes_and_namesakes_with_their_directories(tmp_path: Path) -> None:
    config = make_config()
    for name in ("a", "b"):
        recorder = make_recorder(tmp_path / name, config)
        record(tmp_path / name, WorkersStarted(workers=["10.0.0.1", "10.0.0.2"], seconds=1.0))
        drive(recorder, config, range(1, 5))
        recorder.close()
    with Exporter(tmp_path / "a", "toy", "127.0.0.1", 0) as one, Exporter(tmp_path / "b", "toy", "127.0.0.1", 0) as two:
        _, samples = scrape(one)["detour_worker_step_seconds"]
        assert {(s.labels["rank"], s.labels["node"]) for s in samples} == {("0", "10.0.0.1"), ("1", "10.0.0.2")}
        ids = {scrape(exporter)["detour_train_step"][1][0].labels["id"] for exporter in (one, two)}
    assert ids == {RunDirectory(tmp_path / name).id for name in ("a", "b")} and len(ids) == 2


def test_a_closing_exporter_waits_for_the_scrape_that_sees_the_end(tmp_path: Path) -> None:
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:
        for _ in range(2):
            scrape(exporter)
            time.sleep(0.5)
        record(tmp_path, FINISHED)
        seen: list[float] = []
        late = threading.Timer(0.2, lambda: seen.append(values(exporter, "detour_run_state")["finished"]))
        late.start()
    late.join()
    assert seen == [1.0]


def test_a_scrape_of_512_ranks_is_quick_and_whole(tmp_path: Path) -> None:
    config = make_config()
    recorder = make_recorder(tmp_path, config)
    drive(recorder, config, range(1, 5), ranks=512)
    recorder.close()
    with Exporter(tmp_path, "toy", "127.0.0.1", 0) as exporter:
        assert len(scrape(exporter)["detour_worker_step_seconds"][1]) == 512
        spent = []
        for _ in range(5):
            begin = time.perf_counter()
            urlopen(exporter.url).read()
            spent.append(time.perf_counter() - begin)
    print(f"fastest scrape of 512 ranks: {min(spent) * 1000:.1f} ms")
