"""Joining and starting Ray, and the one private call to it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event as ThreadEvent
from threading import Thread
from typing import Any

import pytest
import ray

from configs.errors import InputError, RunFailedError
from launcher import cluster, growth, nodes
from launcher.growth import GrowthWatch
from launcher.head import HeadWatch
from launcher.topology import Topology
from monitoring.events import Resized, record


class FakeRay:
    """Starts that fail a number of times; counts starts and shutdowns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failures: Exception) -> None:
        self.failures, self.calls = list(failures), list[str]()
        monkeypatch.setattr("ray.init", self.init)
        monkeypatch.setattr("ray.shutdown", lambda: self.calls.append("shutdown"))

    def init(self, **options: Any) -> None:
        self.calls.append("init")
        if self.failures:
            raise self.failures.pop(0)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("error", [Exception("The current node timed out during startup"), ConnectionError("no")])
def test_a_start_that_failed_once_is_tried_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeRay(monkeypatch, error)
    with cluster.connect(local_workers=2):
        assert fake.calls == ["init", "shutdown", "init"]
    assert fake.calls[-1] == "shutdown"
    assert [record.levelno for record in caplog.records if record.name == "launcher.cluster"] == [logging.WARNING]


@pytest.mark.usefixtures("alone")
def test_a_start_that_fails_twice_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, Exception("busy"), Exception("still busy"))
    with pytest.raises(RunFailedError, match="still busy"), cluster.connect(local_workers=2):
        pass
    assert fake.calls == ["init", "shutdown"] * 2


@contextmanager
def listening(answer: bytes) -> Iterator[str]:
    """Yield the address of a server that sends `answer` to each client, and then nothing more."""
    clients: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                client.sendall(answer)
                clients.append(client)

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for client in clients:
            client.close()


def refusal_of(address: str, monkeypatch: pytest.MonkeyPatch) -> InputError:
    monkeypatch.setenv("RAY_ADDRESS", address)
    fake = FakeRay(monkeypatch)
    with pytest.raises(InputError) as refusal, cluster.connect(local_workers=2):
        pass
    assert not fake.calls, "Ray itself would try for minutes"
    return refusal.value


@pytest.mark.parametrize(
    "address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265", "127.0.0.1", "127.0.0.1:70000", "no.such.host.:1"]
)
def test_an_address_that_is_no_head_is_refused_by_name(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = refusal_of(address, monkeypatch)
    assert (refusal.key, refusal.code) == ("RAY_ADDRESS", "ray-unreachable") and address in str(refusal)


def test_a_head_that_is_gone_and_another_program_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    with listening(b"SSH-2.0-OpenSSH") as other, listening(b"") as silent:
        for address in (other, silent):
            assert refusal_of(address, monkeypatch).code == "ray-unreachable"
    assert refusal_of(other, monkeypatch).key == "RAY_ADDRESS", "nobody listens any more"


@pytest.mark.parametrize(
    ("says", "key"),
    [
        ("ray.exceptions.AuthenticationError: InvalidAuthToken: Authentication token is missing", "RAY_AUTH_TOKEN"),
        ("Check failed: Ray couldn't find an authentication token. Create a token file", "RAY_AUTH_TOKEN"),
        ("RuntimeError: Version mismatch: The cluster was started with Ray 2.40", "RAY_ADDRESS"),
    ],
)
def test_the_head_refuses_and_the_message_names_the_variable(
    says: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The health check is replaced, because a real head takes seconds to start; tests of clusters meet the real one."""
    failed = subprocess.CompletedProcess([], 1, "", f"Traceback\n{says}\n")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    with listening(b"\0\0\x18\4\0\0\0\0\0") as head:
        assert refusal_of(head, monkeypatch).key == key


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\0", None], ids=["empty", "blank", "binary", "missing"])
def test_a_token_that_cannot_be_sent(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))) as refusal, cluster.connect(local_workers=1):
        pass
    assert (refusal.value.key, refusal.value.code) == ("RAY_AUTH_TOKEN_PATH", "ray-token") and not fake.calls
    path.write_bytes(b"0123abcd\n")
    with cluster.connect(local_workers=1):
        assert fake.calls, "a line break at its end is no fault"


def test_a_head_that_stops_answering_is_told_once() -> None:
    told: list[str] = []
    lost = ThreadEvent()
    with listening(b"") as address, HeadWatch(address, lambda message: (told.append(message), lost.set()), 0.2):
        time.sleep(0.5)
        assert not told
    with HeadWatch(address, lambda message: (told.append(message), lost.set()), 0.2):
        assert lost.wait(20)
    assert len(told) == 1 and address in told[0]


def node(number: int, port: int, cpus: int = 2) -> nodes.Node:
    return nodes.Node(str(number), "127.0.0.1", port, cpus, 0)


def test_a_run_grows_only_onto_nodes_that_are_free_and_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(b"") as address:
        port = int(address.rpartition(":")[2])
        present = [node(0, port), node(1, port), node(2, port)]
        free = {"1": {"CPU": 2.0}, "2": {"CPU": 1.0}}
        monkeypatch.setattr(growth, "alive_nodes", lambda: present)
        monkeypatch.setattr(nodes, "_ask_ray_for_free_resources", lambda: free)

        def has_room(target: int, every: float = 0) -> bool:
            return GrowthWatch(tmp_path, [Topology(target, 2, gpu=False)], {"0"}, every).has_room()

        assert has_room(2) and not has_room(3), "node 2 is in use"
        free["2"]["CPU"] = 2.0
        assert has_room(3)
        present[2] = node(2, port=1)
        assert not has_room(3), "node 2 does not answer"
        record(tmp_path, Resized(step=3))
        assert has_room(2) and not has_room(2, every=300), "it has grown a moment ago"


def test_ray_still_tells_what_is_free() -> None:
    """The contract of `launcher.nodes.free_nodes`."""
    assert not inspect.signature(ray._private.state.available_resources_per_node).parameters


@pytest.mark.parametrize("error", [AttributeError, TypeError, ImportError, RuntimeError])
def test_a_changed_ray_costs_the_drain_notice_and_one_warning(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Changed:
        def get_draining_nodes(self) -> dict[str, int]:
            raise error("Ray has changed")

    monkeypatch.setattr(nodes, "_has_warned", False)
    monkeypatch.setattr("ray._private.state.state", Changed())
    assert nodes.draining_nodes() == nodes.draining_nodes() == {}
    assert len([record for record in caplog.records if record.name == "launcher.nodes"]) == 1


def test_ray_still_has_get_draining_nodes() -> None:
    """The contract of `launcher.nodes.draining_nodes`; a failure names what an upgrade of Ray has changed."""
    signature = inspect.signature(type(ray._private.state.state).get_draining_nodes)
    assert list(signature.parameters) == ["self"]


def test_a_loss_is_told_in_rays_words_or_by_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's fields were read from a real cluster: a raylet that was killed, and one that was drained."""

    def entry(id: str, alive: bool, port: int, reason: int = 0, message: str = "") -> dict[str, Any]:
        death = {"DeathReason": reason, "DeathReasonMessage": message}
        place = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
        return {"NodeID": id, "Alive": alive, "Resources": {}, **place, **death}

    with listening(b"") as address:
        listed = [
            entry("here", True, int(address.rpartition(":")[2])),
            entry("silent", True, 1),
            entry("killed", False, 1, 2, "health check failed due to missing too many heartbeats"),
            entry("preempted", False, 1, 3, "spot instance reclaimed"),
            entry("untold", False, 1),
        ]
        monkeypatch.setattr("ray.nodes", lambda: listed)
        monkeypatch.setattr(nodes, "_ask_ray_for_draining_nodes", dict)
        lost = nodes.lost_nodes(["here", "silent", "killed", "preempted", "untold", "forgotten"])
    assert lost["killed"] == "the node ended without notice: health check failed due to missing too many heartbeats"
    assert lost["preempted"] == "the node was preempted: spot instance reclaimed"
    assert "127.0.0.1:1 does not answer: Connection refused" in str(lost["silent"])
    assert lost["untold"] is lost["forgotten"] is None and "here" not in lost


def test_ray_still_tells_why_a_node_died() -> None:
    """The contract of `launcher.nodes.DEATHS`."""
    from ray.core.generated.common_pb2 import DESCRIPTOR

    reasons = DESCRIPTOR.message_types_by_name["NodeDeathInfo"].enum_types_by_name["Reason"].values_by_number
    assert {number: reasons[number].name for number in nodes.DEATHS} == {
        1: "EXPECTED_TERMINATION",
        2: "UNEXPECTED_TERMINATION",
        3: "AUTOSCALER_DRAIN_PREEMPTED",
        4: "AUTOSCALER_DRAIN_IDLE",
    }
