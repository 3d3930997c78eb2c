"""Notices when the numbers of a run go wrong: non-finite steps, loss spikes, replicas that differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from configs.errors import RunFailedError
from monitoring.events import LossSpike, StepSkipped, record

MAX_SKIPPED = 5
"""Consecutive steps without a finite loss and gradient after which the run fails."""
SPIKE = 6.0
"""Standard deviations above the running mean from which a loss counts as a spike."""
MEMORY = 0.98
"""Weight per step of the past in the running mean and variance of the loss."""
SETTLED = 50
"""Steps of an objective before which a loss never counts as a spike."""


class Guards:
    """Watches the loss and the gradient norm on every rank; only rank 0 writes events.

    Args:
        directory: The run directory.
        state: `state()` of the checkpoint that the run resumes from.
    """

    def __init__(self, directory: Path, state: dict[str, list[float]] | None = None) -> None:
        self._directory = directory
        self._skipped = 0
        self._losses = {objective: (int(count), *rest) for objective, (count, *rest) in (state or {}).items()}

    def state(self) -> dict[str, list[float]]:
        """Return count, mean and variance of each objective's losses, as JSON values."""
        return {objective: list(numbers) for objective, numbers in self._losses.items()}

    def check(self, step: int, objective: str, loss: float, grad_norm: float, suspects: list[str]) -> None:
        """Look at a finished step. A step whose loss is not finite has no finite gradient norm either.

        Args:
            step: Completed steps.
            objective: Name of the objective.
            loss: Mean loss of the step over all ranks.
            grad_norm: Global gradient norm.
            suspects: Sequences whose loss was not finite on this rank.

        Raises:
            RunFailedError: The last MAX_SKIPPED steps were not finite; raised on every rank.
        """
        if math.isfinite(grad_norm):
            self._skipped = 0
            self._watch_loss(step, objective, loss)
            return
        self._skipped += 1
        gathered: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(gathered, suspects)
        named = [f"rank {rank}: {suspect}" for rank, part in enumerate(gathered) for suspect in part]
        unnamed = "the gradient overflowed in backward" if math.isfinite(loss) else "no token of the step has a label"
        sequences = "; ".join(named) or f"no single sequence: {unnamed}"
        if dist.get_rank() == 0:
            record(self._directory, StepSkipped(step=step, loss=loss, grad_norm=grad_norm, where=sequences))
        if self._skipped >= MAX_SKIPPED:
            raise RunFailedError(
                f"step {step}: no finite loss and gradient in {self._skipped} steps in a row ({sequences}); the "
                "weights are those of the step before them. Lower optimizer.lr, or look at the named sequences, and "
                "run again"
            )

    def _watch_loss(self, step: int, objective: str, loss: float) -> None:
        count, mean, variance = self._losses.get(objective, (0, loss, 0.0))
        excess = loss - mean
        if count >= SETTLED and excess > SPIKE * math.sqrt(variance) and dist.get_rank() == 0:
            record(self._directory, LossSpike(step=step, loss=round(loss, 4), usual=round(mean, 4)))
        weight = max(1 - MEMORY, 1 / (count + 1))
        variance = (1 - weight) * (variance + weight * excess * excess)
        self._losses[objective] = (count + 1, mean + weight * excess, variance)


class ReplicaGuard:
    """Compares the weights of data-parallel replicas by a running checksum of their bits.

    Replicas compute with the same weights in every step, so a difference is silent corruption by hardware or software.
    The optimizer's exchange of weights overwrites such a difference. Therefore each step's weights enter the checksum
    before the optimizer's step, without a synchronisation, and ranks exchange checksums before each checkpoint.

    Args:
        weights: Tensors that hold all weights of this rank's model, each [n] of a multiple of 8 bytes.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights = weights
        self._group = parallel_state.get_data_parallel_group()
        self._checksum = torch.zeros((), dtype=torch.int64, device=weights[0].device)
        """[] int64, covers the weights of every step since the run started or resumed."""

    @torch.no_grad()
    def observe(self) -> None:
        """Add the weights that this step has used; call it between backward and the optimizer's step."""
        if dist.get_world_size(self._group) > 1:
            step = torch.stack([_checksum(tensor) for tensor in self._weights]).sum()
            self._checksum = self._checksum * 31 + step

    def require_equal(self, step: int) -> None:
        """Compare the checksums after `step` completed steps; all ranks call it together, before they save.

        Raises:
            RunFailedError: Replicas differ; the message names the ranks.
        """
        if dist.get_world_size(self._group) == 1:
            return
        checksums = [torch.empty_like(self._checksum) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(checksums, self._checksum, group=self._group)
        sides: dict[int, list[int]] = {}
        for rank, checksum in zip(dist.get_process_group_ranks(self._group), checksums, strict=True):
            sides.setdefault(int(checksum.item()), []).append(rank)
        verdicts = [""] * dist.get_world_size()
        dist.all_gather_object(verdicts, verdict(list(sides.values())))
        if any(verdicts):
            raise RunFailedError(
                f"step {step}: data-parallel replicas have different weights: "
                f"{'; '.join(sorted({*verdicts} - {''}))}. Suspect their hardware and run again without it; the "
                "existing checkpoints are good, because replicas were equal when they were saved"
            )


def verdict(sides: list[list[int]]) -> str:
    """Name the ranks to suspect.

    Args:
        sides: Groups of ranks; the ranks of a group agree.

    Returns:
        A clause of a message; empty where all ranks agree.
    """
    sides = sorted(sides, key=len, reverse=True)
    minority = sorted(rank for side in sides[1:] for rank in side)
    if not minority:
        return ""
    if len(sides[0]) > len(minority):
        return f"ranks {minority} differ from the majority, ranks {sides[0]}"
    return " and ".join(f"ranks {side}" for side in sides) + " differ, and no majority tells which are right"


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """[] int64, the sum of the bits as integers. The host does not wait for it."""
    return tensor.view(torch.int64).sum()
