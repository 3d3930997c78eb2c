"""Notices when the numbers of a run go wrong: steps without a finite gradient, loss spikes, replicas that differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from configs.errors import RunFailedError
from monitoring.log import append_event

MAX_SKIPPED = 5
"""Steps in a row without a finite gradient before the run is given up."""
SPIKE = 6.0
"""Standard deviations above its running mean at which a loss counts as a spike."""
MEMORY = 0.98
"""Weight of the past in the running mean and variance of the loss, a step."""
SETTLED = 50
"""Steps of an objective before its spikes are told from its descent."""


class Guards:
    """Kept by every rank; only rank 0 writes events."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._skipped = 0
        self._losses: dict[str, tuple[int, float, float]] = {}

    def check(self, step: int, objective: str, loss: float, grad_norm: float, suspects: list[str]) -> None:
        """Look at a finished step; `suspects` are the sequences whose loss was not finite on this rank.

        Raises RunFailedError on every rank after MAX_SKIPPED steps in a row without a finite gradient.
        """
        if math.isfinite(grad_norm):
            self._skipped = 0
            self._watch_loss(step, objective, loss)
            return
        self._skipped += 1
        gathered: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(gathered, suspects)
        found = [f"rank {rank}: {suspect}" for rank, part in enumerate(gathered) for suspect in part]
        where = "; ".join(found) or "no single sequence: the gradient overflowed in backward"
        if dist.get_rank() == 0:
            append_event(self._directory, "step_skipped", step=step, loss=loss, grad_norm=grad_norm, where=where)
        if self._skipped >= MAX_SKIPPED:
            raise RunFailedError(
                f"step {step}: no finite gradient in {self._skipped} steps in a row ({where}); the last checkpoint is "
                "good. Lower optimizer.lr, or look at the named sequences, and run again"
            )

    def _watch_loss(self, step: int, objective: str, loss: float) -> None:
        count, mean, variance = self._losses.get(objective, (0, loss, 0.0))
        excess = loss - mean
        if count >= SETTLED and excess > SPIKE * math.sqrt(variance) and dist.get_rank() == 0:
            append_event(self._directory, "loss_spike", step=step, loss=round(loss, 4), usual=round(mean, 4))
        weight = max(1 - MEMORY, 1 / (count + 1))
        variance = (1 - weight) * (variance + weight * excess * excess)
        self._losses[objective] = (count + 1, mean + weight * excess, variance)


def require_equal_replicas(model: Any, step: int) -> None:
    """Compare the weights that data-parallel replicas have used in this step, by a checksum of their bits.

    All ranks call it together, before the optimizer's step. Replicas get the same weights every step, so a difference
    is silent corruption: a fault of hardware or software.
    Raises RunFailedError naming the ranks.
    """
    total = sum(_checksum(parameter.detach()) for parameter in model.parameters())
    mine = torch.tensor([total], device=next(model.parameters()).device)
    group = parallel_state.get_data_parallel_group()
    sums = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sums, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    differing = [rank for rank, other in zip(ranks, sums, strict=True) if other.item() != sums[0].item()]
    verdicts: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(verdicts, differing)
    if any(verdicts):
        wrong = sorted({rank for verdict in verdicts for rank in verdict})
        raise RunFailedError(
            f"step {step}: the weights of ranks {wrong} differ from their data-parallel replicas'; suspect their "
            "hardware. Nothing was saved since the last checkpoint, which is good; run again without these machines"
        )


def _checksum(tensor: torch.Tensor) -> int:
    integers = tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    return int(integers.sum(dtype=torch.int64).item())
