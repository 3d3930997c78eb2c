"""Which failures a run survives."""

from __future__ import annotations

import pytest

from configs.errors import InputError, RunFailedError
from launcher.failures import FailureBudget
from launcher.group import WorkerError, check_tensor_groups
from launcher.worker import Place


def died(rank: int = 0) -> WorkerError:
    return WorkerError("died", rank, "its process ended")


def test_budget_is_spent_and_named() -> None:
    budget = FailureBudget(allowed=2)
    budget.spend(died(), step=5)
    budget.spend(died(), step=9)
    with pytest.raises(RunFailedError, match=r"rank 1: .* after step 12; .* cluster.max_failures allows 2"):
        budget.spend(died(1), step=12)


def test_an_error_raised_twice_at_the_same_step_is_not_tried_a_third_time() -> None:
    budget = FailureBudget(allowed=100)
    bug = WorkerError("exception", 0, "ValueError: no")
    budget.spend(bug, step=7)
    with pytest.raises(RunFailedError, match=r"same failure 2 times in a row at step 8.*ValueError: no"):
        budget.spend(bug, step=7)


def test_progress_between_two_equal_errors_makes_them_two_errors() -> None:
    budget = FailureBudget(allowed=100)
    for step in range(20):
        assert budget.spend(WorkerError("exception", 0, "ValueError: no"), step) == 0


def test_deaths_without_progress_wait_longer_and_end() -> None:
    budget = FailureBudget(allowed=100)
    assert [budget.spend(died(), step=3), budget.spend(died(), step=3)] == [0, 1]
    with pytest.raises(RunFailedError, match="same failure 3 times"):
        budget.spend(died(), step=3)


def test_tensor_group_across_nodes_is_refused() -> None:
    places = [Place("a", "10.0.0.1", ()), Place("a", "10.0.0.1", ()), Place("a", "10.0.0.1", ())]
    places += [Place("b", "10.0.0.2", ())]
    check_tensor_groups(places, tensor=1)
    with pytest.raises(InputError, match=r"ranks 2 to 3 .* 10\.0\.0\.1, 10\.0\.0\.2; .* multiple of 2"):
        check_tensor_groups(places, tensor=2)
