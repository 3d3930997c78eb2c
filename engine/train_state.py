"""The part of a run's state that changes at every step and is not a tensor."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from engine.checkpoint_meta import CheckpointMeta


@dataclass
class TrainState:
    """Progress of a run, as this rank knows it."""

    step: int = 0
    """Completed steps."""
    phase: int = 0
    """Index of the current phase, from 0."""
    data: dict[str, Any] | None = None
    """Position of the data by stream, of at least the streams that this rank serves; None at the start of the data."""
    micro_batches: dict[str, int] = field(default_factory=dict)
    """The choices of `batch.micro: auto`, as in `CheckpointMeta`."""
    saved_at: float = field(default_factory=time.monotonic)
    """Time by `time.monotonic` at which the last save began, or the run."""

    def state_dict(self) -> dict[str, Any]:
        """Return the fields that a checkpoint keeps, by their names in `CheckpointMeta`."""
        return {"step": self.step, "phase": self.phase, "data": self.data, "micro_batches": self.micro_batches}

    def load_state_dict(self, meta: CheckpointMeta) -> None:
        """Continue from a checkpoint."""
        self.step, self.phase, self.data = meta.step, meta.phase or 0, meta.data
        self.micro_batches = dict(meta.micro_batches)
