"""Joining and starting Ray, and the one private call to it."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import ray

from configs.errors import InputError, RunFailedError
from launcher import cluster


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


def test_a_cluster_that_is_not_there_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    fake = FakeRay(monkeypatch, ConnectionError("nobody answers"))
    with pytest.raises(InputError) as refusal, cluster.connect(local_workers=2):
        pass
    assert refusal.value.key == "RAY_ADDRESS" and "10.0.0.1:6379" in str(refusal.value)
    assert fake.calls == ["init", "shutdown"]


@pytest.mark.parametrize("error", [AttributeError, TypeError, ImportError, RuntimeError])
def test_a_changed_ray_costs_the_drain_notice_and_one_warning(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Changed:
        def get_draining_nodes(self) -> dict[str, int]:
            raise error("Ray has changed")

    monkeypatch.setattr(cluster, "_has_warned", False)
    monkeypatch.setattr("ray._private.state.state", Changed())
    assert cluster.draining_nodes() == cluster.draining_nodes() == {}
    assert len([record for record in caplog.records if record.name == "launcher.cluster"]) == 1


def test_ray_still_has_get_draining_nodes() -> None:
    """The contract of `launcher.cluster.draining_nodes`; a failure names what an upgrade of Ray has changed."""
    signature = inspect.signature(type(ray._private.state.state).get_draining_nodes)
    assert list(signature.parameters) == ["self"]
