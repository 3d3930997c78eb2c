"""Notices when the numbers of a run go wrong: steps that are not finite, loss spikes, replicas that differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from configs.errors import RunFailedError
from monitoring.events import LossSpike, StepSkipped, record

MAX_SKIPPED = 5
"""Steps in a row without a finite loss and gradient before the run is given up."""
SPIKE = 6.0
"""Standard deviations above its running mean at which a loss counts as a spike."""
MEMORY = 0.98
"""Weight of the past in the running mean and variance of the loss, a step."""
SETTLED = 50
"""Steps of an objective before its spikes are told from its descent."""


class Guards:
    """Kept by every rank; only rank 0 writes events."""

    def __init__(self, directory: Path, state: dict[str, list[float]] | None = None) -> None:
        """`state`: of the checkpoint resumed from."""
        self._directory = directory
        self._skipped = 0
        self._losses = {objective: (int(count), *rest) for objective, (count, *rest) in (state or {}).items()}

    def state(self) -> dict[str, list[float]]:
        """JSON for the checkpoint: count, mean and variance of each objective's losses."""
        return {objective: list(numbers) for objective, numbers in self._losses.items()}

    def check(self, step: int, objective: str, loss: float, grad_norm: float, suspects: list[str]) -> None:
        """Look at a finished step; `suspects` are the sequences whose loss was not finite on this rank.

        A step whose loss is not finite has no finite norm either. Raises RunFailedError on every rank after MAX_SKIPPED
        such steps in a row.
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
            record(self._directory, StepSkipped(step=step, loss=loss, grad_norm=grad_norm, where=where))
        if self._skipped >= MAX_SKIPPED:
            raise RunFailedError(
                f"step {step}: no finite loss and gradient in {self._skipped} steps in a row ({where}); the weights "
                "are those of the step before them. Lower optimizer.lr, or look at the named sequences, and run again"
            )

    def _watch_loss(self, step: int, objective: str, loss: float) -> None:
        count, mean, variance = self._losses.get(objective, (0, loss, 0.0))
        excess = loss - mean
        if count >= SETTLED and excess > SPIKE * math.sqrt(variance) and dist.get_rank() == 0:
            record(self._directory, LossSpike(step=step, loss=round(loss, 4), usual=round(mean, 4)))
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
    sides: dict[int, list[int]] = {}
    for rank, other in zip(ranks, sums, strict=True):
        sides.setdefault(int(other.item()), []).append(rank)
    verdicts = [""] * dist.get_world_size()
    dist.all_gather_object(verdicts, _verdict(list(sides.values())))
    if any(verdicts):
        raise RunFailedError(
            f"step {step}: data-parallel replicas have different weights: {'; '.join(sorted({*verdicts} - {''}))}. "
            "Suspect their hardware and run again without it; checkpoints saved before the last comparison that found "
            "them equal are not concerned"
        )


def _verdict(sides: list[list[int]]) -> str:
    """Who is to blame where ranks that should agree stand on different sides; empty where there is one."""
    sides = sorted(sides, key=len, reverse=True)
    others = sorted(rank for side in sides[1:] for rank in side)
    if not others:
        return ""
    if len(sides[0]) > len(others):
        return f"ranks {others} differ from the majority, ranks {sides[0]}"
    return " and ".join(f"ranks {side}" for side in sides) + " differ, and no majority tells which are right"


def _checksum(tensor: torch.Tensor) -> int:
    integers = tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    return int(integers.sum(dtype=torch.int64).item())
