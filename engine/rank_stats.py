"""Numbers that ranks share: a sum over all ranks at every step, and each rank's own view at logged steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from datapipe.batch import Drawn
from engine import device


def reports_loss() -> bool:
    """Whether this rank reports for its data-parallel replica: it has the loss, and no other rank of the replica does.

    It is the first tensor-parallel rank of the last pipeline stage.
    """
    return bool(parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0)


class StepTotals(NamedTuple):
    """One rank's contribution to a step, and after `sum_over_ranks` that of all ranks."""

    label_bytes: float
    """UTF-8 bytes of the text that the labels stand for."""
    flops: float
    """Floating-point operations of forward and backward."""
    save: float
    """More than 0: rank 0 asks for a checkpoint."""
    stop: float
    """More than 0: rank 0 asks to stop."""
    data_ended: float
    """Ranks whose data ends with this step."""
    writing: float
    """Ranks that are writing a checkpoint."""
    clm_loss_sum: float = 0.0
    """Sum of the losses over the label positions of CLM."""
    clm_label_tokens: float = 0.0
    """Label positions of CLM."""
    clm_tokens: float = 0.0
    """Tokens of the rows trained by CLM, padding not counted."""
    mlm_loss_sum: float = 0.0
    mlm_label_tokens: float = 0.0
    mlm_tokens: float = 0.0

    @property
    def loss(self) -> float:
        """Mean loss over the label positions."""
        return (self.clm_loss_sum + self.mlm_loss_sum) / max(1.0, self.clm_label_tokens + self.mlm_label_tokens)

    @property
    def losses(self) -> dict[str, float]:
        """Mean loss of each objective over its label positions; an objective without any is left out."""
        sums = {"clm": (self.clm_loss_sum, self.clm_label_tokens), "mlm": (self.mlm_loss_sum, self.mlm_label_tokens)}
        return {name: loss / labels for name, (loss, labels) in sums.items() if labels}

    @property
    def tokens(self) -> float:
        """Tokens, padding not counted."""
        return self.clm_tokens + self.mlm_tokens

    @property
    def objective_tokens(self) -> dict[str, int]:
        """Tokens of the rows trained by each objective, padding not counted."""
        return {"clm": int(self.clm_tokens), "mlm": int(self.mlm_tokens)}

    @property
    def bits_per_byte(self) -> float:
        """Bits of loss per byte of the predicted text; NaN without text."""
        return (
            (self.clm_loss_sum + self.mlm_loss_sum) / math.log(2) / self.label_bytes if self.label_bytes else math.nan
        )

    def sum_over_ranks(self) -> StepTotals:
        """Return the sum over all ranks, by one small all-reduce."""
        sums = torch.tensor(self, dtype=torch.float64, device=device.device())
        dist.all_reduce(sums)
        return StepTotals(*sums.tolist())


@dataclass(frozen=True)
class RankStats:
    """One rank's view of a logged step."""

    step_seconds: float
    """Time for data, forward and backward, without waiting for other data-parallel ranks."""
    memory_bytes: float
    gpu_utilization: float
    """Share of the last second in which its GPU ran a kernel; NaN where unknown."""
    drawn: dict[str, Drawn]
    """Counts of each source since the run's first step; zeros except on one rank per data-parallel replica."""
    epochs: dict[str, int]
    """Epoch of each source, from 0."""

    def gather(self) -> list[RankStats]:
        """Return every rank's statistics, by one all-gather. All ranks have the same sources in the same order."""
        own = torch.tensor(self._to_floats(), dtype=torch.float64)
        rows = [torch.empty_like(own, device=device.device()) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own.to(device.device()))
        return [self._from_floats(row) for row in torch.stack(rows).tolist()]

    def _to_floats(self) -> list[float]:
        counts = [float(count) for drawn in self.drawn.values() for count in drawn]
        return [self.step_seconds, self.memory_bytes, self.gpu_utilization, *counts, *self.epochs.values()]

    def _from_floats(self, values: list[float]) -> RankStats:
        """Read `_to_floats` of a rank with the same sources."""
        remaining = iter(values)
        return RankStats(
            step_seconds=next(remaining),
            memory_bytes=next(remaining),
            gpu_utilization=next(remaining),
            drawn={name: Drawn(*(int(next(remaining)) for _ in Drawn._fields)) for name in self.drawn},
            epochs={name: int(next(remaining)) for name in self.epochs},
        )


def total_drawn(ranks: Sequence[RankStats]) -> dict[str, Drawn]:
    """Return the counts of each source over all ranks."""
    return {name: Drawn(*map(sum, zip(*(rank.drawn[name] for rank in ranks), strict=True))) for name in ranks[0].drawn}


def latest_epochs(ranks: Sequence[RankStats]) -> dict[str, int]:
    """Return the furthest epoch of each source over all ranks."""
    return {name: max(rank.epochs[name] for rank in ranks) for name in ranks[0].epochs}
