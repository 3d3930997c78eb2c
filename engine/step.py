"""The passes of one training step on this rank, through Megatron's pipeline schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray

from configs.schema import Optimizer
from datapipe.batch import IGNORE, MicroBatch, label_bytes
from engine import device
from engine.megatron.ddp_timing import ParameterWaits
from engine.megatron.gradient_norms import GradientNorms
from engine.megatron.optimizer import (
    FrozenWeights,
    prepare_gradients,
    set_learning_rate,
    undo_step_count,
    update,
)
from engine.modernbert.attention import PackedDocuments
from engine.modernbert.config import DropoutRates
from engine.modernbert.dropout import Dropout
from engine.modernbert.model import ModernBert
from engine.objectives import Objective
from engine.rank_stats import reports_loss


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch on the device, as the model takes it."""

    inputs: torch.Tensor
    """[1, T] int64, token ids."""
    documents: PackedDocuments
    label_positions: torch.Tensor
    """[N] int64, positions that carry a loss."""
    labels: torch.Tensor
    """[N] int64, token ids to predict there."""
    num_label_tokens: torch.Tensor
    """[] int32, N."""


def to_device_batch(micro_batch: MicroBatch, dropout: DropoutRates | None = None) -> DeviceBatch:
    """Copy a micro-batch to the device. A GPU copies in its stream's order, and the host does not wait for it.

    Args:
        micro_batch: Packed sequences with inputs and labels.
        dropout: Rates of a training batch; None in evaluation.
    """
    target = device.device()
    labels: Any = micro_batch.labels
    if isinstance(labels, np.ndarray):  # by NumPy, because torch would wait for threads of its own on busy cores
        positions = torch.from_numpy(np.flatnonzero(labels != IGNORE))
        labels = torch.from_numpy(labels[positions.numpy()])
    else:  # the dali backend's labels are on the GPU already
        positions = (labels != IGNORE).nonzero().squeeze(1)
        labels = labels[positions]
    # Next-token prediction has labels nearly everywhere, so it computes all of the last layer.
    needed = None if micro_batch.is_causal else positions.cpu().numpy()
    lengths = tuple((micro_batch.cu_seqlens[1:] - micro_batch.cu_seqlens[:-1]).tolist())
    # A thread's current GPU is the first one, so the data thread must set this process's own.
    with torch.cuda.device(target) if target.type == "cuda" else nullcontext():
        drop = dropout and Dropout.of_rows(dropout, micro_batch.origins, len(micro_batch.inputs), target)
        return DeviceBatch(
            device.to_device(torch.as_tensor(micro_batch.inputs)[None], target),
            PackedDocuments.from_lengths(lengths, micro_batch.is_causal, target, drop, needed),
            device.to_device(positions, target),
            device.to_device(labels, target),
            device.to_device(torch.tensor(len(positions), dtype=torch.int32), target),
        )


class Evaluation(NamedTuple):
    """Means over the label positions of the held-out set, by objective."""

    loss: dict[str, float]
    accuracy: dict[str, float]
    bits_per_byte: dict[str, float]
    """Bits of loss per byte of the predicted text."""


@dataclass
class StepRunner:
    """One rank's model and optimizer, and the passes of a step."""

    model: ModernBert
    """This rank's pipeline stage, bare."""
    ddp_model: Any
    """`model` inside Megatron's DDP, and its bf16 wrapper."""
    optimizer: Any
    """Megatron's distributed optimizer."""
    parameter_waits: ParameterWaits
    """Leaves the waits of `ddp_model` for other ranks' parameters out of a step's own time."""
    settings: Optimizer
    """The configuration's optimizer section."""
    frozen: FrozenWeights
    on_launched: Callable[[], None]
    """Called when the host has launched a step's kernels and is about to wait for the GPU."""

    def forward_backward(self, batches: Sequence[DeviceBatch]) -> tuple[torch.Tensor, device.Stopwatch]:
        """Compute the gradients of the mean loss over the label positions of the global batch.

        The loss is a sum, and Megatron divides the gradients by the label positions of all data-parallel ranks
        (calculate_per_token_loss). So the result does not depend on how tokens fell on ranks and micro-batches.

        Returns:
            losses: [micro-batches] fp32, summed loss of each; empty before the last pipeline stage. A GPU may still be
                computing them.
            watch: The time of this rank's own work, without waiting for other data-parallel ranks.
        """
        self.ddp_model.zero_grad_buffer()
        self.optimizer.zero_grad()
        watch = device.Stopwatch(on_device=True)

        def reduce_gradients(*args: Any, **more: Any) -> None:
            watch.stop()  # because from here on every rank waits for the slowest one
            finalize_model_grads(*args, **more)

        self.parameter_waits.stopwatch = watch
        self.model.config.finalize_model_grads_func = reduce_gradients
        losses = self._run(batches, forward_only=False)[:, 0]
        self.on_launched()
        return losses, watch

    def optimizer_step(
        self,
        losses: torch.Tensor,
        learning_rate: float | None = None,
        peak: float | None = None,
        by_part: bool = False,
    ) -> torch.Tensor:
        """Update the weights, except frozen ones, unless a loss or gradient of any rank is not finite.

        Args:
            losses: This rank's losses by `forward_backward`.
            learning_rate: Learning rate of this step; None keeps the one of the step before.
            peak: Peak learning rate of the phase; `optimizer.lr` if not given.
            by_part: Compute the norm of each part too. All ranks say the same.

        Returns:
            [1] or [1 + parts] fp32 on the device: the global gradient norm before clipping, then those of
            `gradient_norms.parts`. A GPU may still be computing them.
        """
        if learning_rate is not None:
            set_learning_rate(self.optimizer, learning_rate, peak or self.settings.lr, self.settings)
        self.frozen.clear_gradients()
        prepare_gradients(self.optimizer, losses)
        norms = [self._gradient_norms.compute()] if by_part else []
        return torch.cat([update(self.optimizer).view(1), *norms])

    @functools.cached_property
    def _gradient_norms(self) -> GradientNorms:
        return GradientNorms(self.model, self.optimizer)

    def undo_step_count(self) -> None:
        """Take a step that was not finite out of the optimizer's step count; before the next save at the latest."""
        undo_step_count(self.optimizer)

    def evaluate(self, held_out: dict[Objective, list[MicroBatch]], byte_lengths: NDArray[np.int32]) -> Evaluation:
        """Run the held-out set forward; the training streams and the weights are not touched.

        Args:
            held_out: This rank's share of the held-out set, as each objective sees it.
            byte_lengths: `Tokenizer.byte_lengths`.
        """
        result = Evaluation({}, {}, {})
        for objective, micro_batches in held_out.items():
            self.ddp_model.eval()
            batches = [to_device_batch(micro_batch) for micro_batch in micro_batches]
            with torch.no_grad():
                sums = self._run(batches, forward_only=True).sum(dim=0, dtype=torch.float64)
            self.ddp_model.train()
            label_tokens = sum(int((micro_batch.labels != IGNORE).sum()) for micro_batch in micro_batches)
            text = sum(label_bytes(micro_batch.labels, byte_lengths) for micro_batch in micro_batches)
            share = [*sums.tolist(), label_tokens, text] if reports_loss() else [0.0] * 4
            totals = torch.tensor(share, dtype=torch.float64, device=device.device())
            dist.all_reduce(totals)
            result.loss[objective.name], result.accuracy[objective.name] = (totals[:2] / totals[2]).tolist()
            result.bits_per_byte[objective.name] = float(totals[0] / totals[3]) / math.log(2)
        return result

    def _run(self, batches: Sequence[DeviceBatch], forward_only: bool) -> torch.Tensor:
        """[micro-batches, 2]: summed loss and correct predictions of each; [0, 2] before the last pipeline stage."""
        lengths = {batch.inputs.shape[1] for batch in batches}
        # A mixture of objectives has micro-batches of different sizes, whose shapes pipeline stages must exchange.
        self.model.config.variable_seq_lengths = len(lengths) > 1
        outputs = get_forward_backward_func()(
            forward_step_func=lambda data, model: _forward(next(data), model),
            data_iterator=iter(batches),
            model=self.ddp_model,
            num_microbatches=len(batches),
            seq_length=batches[0].inputs.shape[1],
            micro_batch_size=1,  # Megatron's own: our micro-batch is one row of packed documents
            forward_only=forward_only,
        )
        if not outputs:
            return torch.zeros(0, 2, device=device.device())
        return torch.stack([output["sums"] for output in outputs])


def weight_buffers(ddp_model: DistributedDataParallel) -> list[torch.Tensor]:
    """Return the flat buffers that hold all weights of this rank's model, padded with zeros."""
    return [buffer.param_data for buffer in ddp_model.buffers]


def _forward(batch: DeviceBatch, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    output = model(batch.inputs, batch.documents, batch.label_positions, batch.labels)

    def loss(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return sums[0], batch.num_label_tokens, {"sums": sums.detach()}

    return output, loss
