import json
import socket
import stat
import subprocess
import threading
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from monitoring.discovery import announced, live_targets, serve_targets


def test_runs_announce_themselves_side_by_side_and_leave_nothing(tmp_path: Path) -> None:
    targets = tmp_path / "a" / "targets"
    with announced(targets, "127.0.0.1:9464"), announced(targets, "127.0.0.1:9465"):
        files = list(targets.glob("*.json"))
        found = [json.loads(path.read_text()) for path in files]
        assert sorted(group["targets"][0] for groups in found for group in groups) == [
            "127.0.0.1:9464",
            "127.0.0.1:9465",
        ]
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in files)
        assert stat.S_IMODE(targets.stat().st_mode) == 0o1777
    assert list(targets.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_what_lives_elsewhere_is_kept(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    me = psutil.Process()
    left = tmp_path / f"{socket.gethostname()}-9464-{dead.pid}-{me.create_time():.0f}.json"
    reused = tmp_path / f"{socket.gethostname()}-9464-{me.pid}-{me.create_time() - 3600:.0f}.json"
    elsewhere = tmp_path / f"another-host-9464-{dead.pid}-{me.create_time():.0f}.json"
    for path in (left, reused, elsewhere):
        path.write_text(json.dumps([{"targets": [path.stem], "labels": {"job": "detour"}}]))
    (tmp_path / "broken.json").write_text("[{")
    assert [group["targets"] for group in live_targets(tmp_path)] == [[elsewhere.stem]]
    assert not left.exists()
    assert not reused.exists(), "its process's number belongs to another one now"


def test_targets_that_are_a_file_do_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "targets").touch()
    with announced(tmp_path / "targets", "127.0.0.1:9464"):
        assert "monitoring.targets" in caplog.text


def test_the_same_list_over_http(tmp_path: Path) -> None:
    server = serve_targets(tmp_path, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    with announced(tmp_path, "127.0.0.1:9464"), urlopen(url) as answer:
        assert answer.headers["Content-Type"] == "application/json"
        assert json.load(answer) == [{"targets": ["127.0.0.1:9464"], "labels": {"job": "detour"}}]
    with urlopen(url) as answer:
        assert json.load(answer) == []
    server.shutdown()
    server.server_close()
