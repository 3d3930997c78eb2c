"""One pass over micro-batches, forward and backward or forward alone, through Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from datapipe.batch import IGNORE, MicroBatch, StepData
from engine import device
from engine.modernbert.attention import PackedDocuments

if TYPE_CHECKING:
    from engine.objectives import Objective
    from engine.setup import Trainer


@dataclass(frozen=True)
class Staged:
    """A micro-batch as the model takes it, on the device."""

    inputs: torch.Tensor
    """[1, T] int64"""
    documents: PackedDocuments
    paying: torch.Tensor
    """[N] int64: the positions that pay a loss."""
    labels: torch.Tensor
    """[N] int64: what they must predict."""
    count: torch.Tensor
    """[] int32: N."""


def staged(micro: MicroBatch, causal: bool) -> Staged:
    """Its copies to a GPU are in the stream's order and wait for nothing: made while a step runs, they are there when
    the next one starts.
    """
    where = device.device()
    labels: Any = micro.labels
    if isinstance(labels, np.ndarray):  # by NumPy: torch would wait for threads of its own, on cores that may be busy
        paying = torch.from_numpy(np.flatnonzero(labels != IGNORE))
        labels = torch.from_numpy(labels[paying.numpy()])
    else:  # the dali backend's are on the GPU already
        paying = (labels != IGNORE).nonzero().squeeze(1)
        labels = labels[paying]
    lengths = tuple((micro.cu_seqlens[1:] - micro.cu_seqlens[:-1]).tolist())
    with torch.cuda.device(where) if where.type == "cuda" else nullcontext():  # a thread's own is the first one
        return Staged(
            device.moved(torch.as_tensor(micro.inputs)[None], where),
            PackedDocuments.from_lengths(lengths, causal, where),
            device.moved(paying, where),
            device.moved(labels, where),
            device.moved(torch.tensor(len(paying), dtype=torch.int32), where),
        )


def batches(
    trainer: Trainer, objective: Objective, first: int, last: int, state: dict[str, Any] | None
) -> Generator[StepData, None, None]:
    """This rank's batches of the 0-based steps first..last-1, staged; `state` as in `Loader.steps`."""
    stage = partial(staged, causal=objective.causal)
    return trainer.loader.steps(objective.targets(), trainer.layout.micro, first, last, state, stage)


def forward_backward(trainer: Trainer, micro_batches: Sequence[Staged]) -> tuple[torch.Tensor, device.Stopwatch]:
    """Gradients of the mean loss over the paying tokens of the global batch; this rank's summed losses, fp32, and the
    time of its own work, in which it did not wait for other data-parallel ranks.

    One loss a micro-batch on the last pipeline stage, none before it. On a GPU they may not have been computed yet.

    The loss is a sum over paying tokens, and Megatron divides the gradients by their count over all data-parallel ranks
    (calculate_per_token_loss), so the result does not depend on how tokens fell on ranks and micro-batches.
    """
    trainer.wrapped.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    watch = device.Stopwatch()

    def reduce_gradients(*args: Any, **more: Any) -> None:
        watch.stop()  # from here on a rank waits for the slowest, so a later time would tell nobody who that is
        finalize_model_grads(*args, **more)

    trainer.parameter_waits.stopwatch = watch
    trainer.model.config.finalize_model_grads_func = reduce_gradients
    losses = _run(trainer, micro_batches, forward_only=False)[:, 0]
    trainer.loader.launched()
    return losses, watch


def evaluate(trainer: Trainer) -> tuple[dict[str, float], dict[str, float]]:
    """Mean loss and accuracy of each objective over the held-out set, at the positions that pay; the training streams
    and the weights are not touched.
    """
    loss, accuracy = {}, {}
    for objective, micro_batches in trainer.evaluation.items():
        trainer.wrapped.eval()
        ready = [staged(micro, objective.causal) for micro in micro_batches]
        with torch.no_grad():
            parts = _run(trainer, ready, forward_only=True).sum(dim=0, dtype=torch.float64)
        trainer.wrapped.train()
        paying = sum(int((micro.labels != IGNORE).sum()) for micro in micro_batches)
        mine = [*parts.tolist(), paying] if counts_here() else [0.0, 0.0, 0.0]
        sums = torch.tensor(mine, dtype=torch.float64, device=device.device())
        dist.all_reduce(sums)
        loss[objective.name], accuracy[objective.name] = (sums[:2] / sums[2]).tolist()
    return loss, accuracy


def counts_here() -> bool:
    """One rank of each data-parallel replica, the one that has its loss, speaks for it."""
    return bool(parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0)


def _run(trainer: Trainer, micro_batches: Sequence[Staged], forward_only: bool) -> torch.Tensor:
    """Summed loss and count of right answers of each micro-batch, [micro-batches, 2]; [0, 2] before the last stage."""
    parts = get_forward_backward_func()(
        forward_step_func=lambda data, model: _forward(next(data), model),
        data_iterator=iter(micro_batches),
        model=trainer.wrapped,
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].inputs.shape[1],
        micro_batch_size=1,  # Megatron's: a micro-batch of ours is one row of packed documents
        forward_only=forward_only,
    )
    return torch.stack([part["sums"] for part in parts]) if parts else torch.zeros(0, 2, device=device.device())


def _forward(micro: Staged, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    output = model(micro.inputs, micro.documents, micro.paying, micro.labels)

    def loss(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return sums[0], micro.count, {"sums": sums.detach()}

    return output, loss
