"""The time that the forward pass waits for parameters of other ranks, left out of a step's own time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.device import Stopwatch


class ParameterWaits:
    """Stops a stopwatch while the forward pass waits for parameters that other data-parallel ranks have updated."""

    stopwatch: Stopwatch | None = None
    """The stopwatch of the step under way; the caller sets it before each step. Ignored while it is stopped."""

    def timed(self, bucket_group: Any) -> Callable[..., None]:
        """Return the bucket group's `finish_param_sync`, around which the stopwatch stands still."""
        wait = bucket_group.finish_param_sync

        def finish_param_sync(*args: Any, **kwargs: Any) -> None:
            watch = self.stopwatch
            arrived = bucket_group.param_gather_dispatched and bucket_group.param_gather_handle is None
            if watch is None or not watch.runs or arrived:
                wait(*args, **kwargs)
                return
            watch.stop()
            wait(*args, **kwargs)
            watch.start()

        return finish_param_sync


def install(ddp_model: Any) -> ParameterWaits:
    """Time the parameter waits of a model in DistributedDataParallel with overlap_param_gather. Call once per model.

    Written for Megatron 0.16.1 and 0.19.2: the forward hooks call `finish_param_sync` on each of `bucket_groups`;
    the all-gather is over where `param_gather_dispatched` is true and `param_gather_handle` is None.
    """
    waits = ParameterWaits()
    for bucket_group in ddp_model.bucket_groups:
        bucket_group.finish_param_sync = waits.timed(bucket_group)
    return waits
