"""Numbers that ranks share: sums over all ranks at every step, and each rank's own view at logged steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from transformers import ModernBertConfig

from datapipe.batch import IGNORE, Drawn, MicroBatch, label_bytes
from engine import device
from engine.flops import training_flops


def reports_loss() -> bool:
    """Return whether this rank reports for its data-parallel replica: it alone has the loss.

    It is the first tensor-parallel rank of the last pipeline stage.
    """
    return bool(parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0)


class Decisions(NamedTuple):
    """One rank's contribution to what all ranks do after a step, and after `sum_over_ranks` that of all ranks.

    They pass from host to host, so that no host waits for its GPU.
    """

    save: float
    """More than 0: rank 0 asks for a checkpoint."""
    stop: float
    """More than 0: rank 0 asks to stop."""
    data_ended: float
    """Ranks whose data ends with this step."""
    writing: float
    """Ranks that are writing a checkpoint."""

    def sum_over_ranks(self, hosts: dist.ProcessGroup) -> Decisions:
        """Return the sum over the ranks of `hosts`, a gloo group of all of them."""
        sums = torch.tensor(self, dtype=torch.float64)
        dist.all_reduce(sums, group=hosts)
        return Decisions(*sums.tolist())


class StepTotals(NamedTuple):
    """Sums over all ranks of a step, or one rank's contribution."""

    label_bytes: float = 0.0
    """UTF-8 bytes of the text that the labels stand for."""
    flops: float = 0.0
    """Floating-point operations of forward and backward."""
    clm_label_tokens: float = 0.0
    """Label positions of CLM."""
    clm_tokens: float = 0.0
    """Tokens of the rows trained by CLM, padding not counted."""
    mlm_label_tokens: float = 0.0
    mlm_tokens: float = 0.0
    clm_loss_sum: float = 0.0
    """Sum of the losses over the label positions of CLM."""
    mlm_loss_sum: float = 0.0

    @classmethod
    def counted(
        cls, micro_batches: Sequence[MicroBatch], architecture: ModernBertConfig, byte_lengths: NDArray[np.int32]
    ) -> StepTotals:
        """Count this rank's micro-batches. The losses are left out, because the device may still compute them."""
        sums: defaultdict[str, float] = defaultdict(float)
        for micro_batch in micro_batches if reports_loss() else ():
            labels = int((micro_batch.labels != IGNORE).sum())
            lengths = micro_batch.cu_seqlens[1:] - micro_batch.cu_seqlens[:-1]
            sums["label_bytes"] += label_bytes(micro_batch.labels, byte_lengths)
            sums["flops"] += training_flops(architecture, lengths, labels, micro_batch.is_causal)
            sums[f"{micro_batch.objective}_label_tokens"] += labels
            sums[f"{micro_batch.objective}_tokens"] += micro_batch.tokens
        return cls(**sums)

    @property
    def loss(self) -> float:
        """Mean loss over the label positions; NaN without any."""
        labels = self.clm_label_tokens + self.mlm_label_tokens
        return (self.clm_loss_sum + self.mlm_loss_sum) / labels if labels else math.nan

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


class StepNumbers:
    """The numbers of a launched step, on their way to the host; all ranks make it together.

    Args:
        micro_batches: This rank's micro-batches.
        counts: `StepTotals.counted` of them.
        losses: [micro-batches] fp32 on the device; empty before the last pipeline stage.
        norms: [1] or [1 + parts] fp32 on the device, as `StepRunner.optimizer_step` returns them.
    """

    def __init__(
        self, micro_batches: Sequence[MicroBatch], counts: StepTotals, losses: torch.Tensor, norms: torch.Tensor
    ) -> None:
        target = losses.device
        sums = device.to_device(torch.tensor(counts, dtype=torch.float64), target)
        losses = losses.double()
        if reports_loss():
            own = [[micro.objective == objective for micro in micro_batches] for objective in ("clm", "mlm")]
            sums[-2:] = torch.where(device.to_device(torch.tensor(own), target), losses, 0.0).sum(dim=1)
        dist.all_reduce(sums)
        self._sizes = len(sums), len(sums) + len(norms)
        self._numbers = device.HostCopy(torch.cat((sums, norms.double(), losses)))

    def read(self) -> tuple[StepTotals, list[float], list[float]]:
        """Wait for the step, and return the sums over all ranks, the gradient norms, and this rank's losses."""
        values, (sums, norms) = self._numbers.read(), self._sizes
        return StepTotals(*values[:sums]), values[sums:norms], values[norms:]


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
