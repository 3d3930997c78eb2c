"""The stopwatch of a step stands still while the forward pass waits for parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from engine.device import Stopwatch
from engine.megatron import ddp_timing


class BucketGroup:
    """A bucket group whose wait tells whether the stopwatch runs meanwhile."""

    def __init__(self) -> None:
        self.param_gather_dispatched = False
        self.param_gather_handle: Any = None
        self.ran_while_waiting: list[bool | None] = []
        self.watch: Stopwatch | None = None

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        assert skip_next_bucket_dispatch
        self.ran_while_waiting.append(self.watch.runs if self.watch else None)
        self.param_gather_dispatched, self.param_gather_handle = True, None


def test_each_step_has_its_own_stopwatch_on_hooks_installed_once() -> None:
    group = BucketGroup()
    waits = ddp_timing.install(SimpleNamespace(bucket_groups=[group]))
    hook = group.finish_param_sync
    hook(skip_next_bucket_dispatch=True)
    for _ in range(2):
        group.param_gather_dispatched = False
        waits.stopwatch = group.watch = Stopwatch()
        hook(skip_next_bucket_dispatch=True)
        hook(skip_next_bucket_dispatch=True)
        assert group.watch.runs
        group.watch.stop()
        hook(skip_next_bucket_dispatch=True)
        assert not group.watch.runs, "a stopped watch is not started again"
    # Per step: the wait, a call after the parameters have arrived, a call after the step's own time.
    assert group.ran_while_waiting == [None, *2 * [False, True, False]]
