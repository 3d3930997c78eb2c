"""Ray that starts badly, and a Ray whose private calls have changed."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import ray

from configs.errors import RunFailedError
from launcher import cluster


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What successive calls of `ray.init` do: raise, or succeed. The test fills the list."""
    outcomes: list[Exception | None] = []

    def init(**options: Any) -> None:
        if outcome := outcomes.pop(0):
            raise outcome

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return outcomes


def test_a_start_that_times_out_is_tried_once_more(starts: list[Exception | None]) -> None:
    starts += [Exception("The current node timed out during startup."), None]
    with cluster.connect(local_workers=1):
        pass
    assert not starts


def test_a_start_that_times_out_twice_ends_the_run(starts: list[Exception | None]) -> None:
    starts += [Exception("The current node timed out during startup.")] * 3
    with pytest.raises(RunFailedError), cluster.connect(local_workers=1):
        pass
    assert len(starts) == 1


@pytest.mark.parametrize("fault", [AttributeError("get_draining_nodes"), TypeError("missing argument")])
def test_a_changed_ray_costs_the_drain_notice_and_one_warning(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def changed() -> dict[str, int]:
        raise fault

    monkeypatch.setattr(cluster, "_ask_ray_for_draining_nodes", changed)
    cluster._warn_of_no_notice.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cluster.draining_nodes() == {}
        assert cluster.draining_nodes() == {}
    assert len([record for record in caplog.records if "drained" in record.getMessage()]) == 1


def test_contract_of_ray_draining_nodes() -> None:
    """Ray 2.60 answers with a dictionary; after an upgrade this fails by name."""
    if os.environ.get("RAY_ADDRESS"):
        pytest.skip("joined to a cluster")
    assert callable(ray._private.state.state.get_draining_nodes)
