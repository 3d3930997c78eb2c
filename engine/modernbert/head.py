"""Cross-entropy of a linear layer, without ever holding the [tokens, vocabulary] logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TILE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Largest block of fp32 logits held at once: enough rows for the matrix products to run at full speed, no more."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        vocabulary: tuple[int, int],
        group: dist.ProcessGroup | None,
        needs_grad: bool,
    ) -> Tensor:
        start, size = vocabulary
        used = max(0, min(weight.shape[0], size - start))  # the rows that pad the vocabulary take no part
        kernel, offset = weight[:used], bias[:used].float()
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_grad else None
        loss, found = hidden.new_zeros((2,), dtype=torch.float32)
        rows = max(1, TILE_BYTES[hidden.device.type] // (4 * weight.shape[0]))
        tile = hidden.new_empty(min(rows, hidden.shape[0]), used)  # once: fresh memory costs as much as a pass over it
        for first in range(0, hidden.shape[0], rows):
            states = hidden[first : first + rows]
            local = labels[first : first + rows] - start
            mine = (local >= 0) & (local < used)
            index = torch.where(mine, local, 0)[:, None]
            logits = torch.mm(states, kernel.t(), out=tile[: len(states)]).float().add_(offset)
            peak = logits.amax(dim=1) if used else logits.new_full((len(states),), -torch.inf)
            if group is not None:
                dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            target = logits.gather(1, index).squeeze(1) - peak if used else torch.zeros_like(peak)
            parts = torch.stack([logits.sub_(peak[:, None]).exp_().sum(dim=1), torch.where(mine, target, 0.0)])
            if group is not None:
                dist.all_reduce(parts, group=group)
            loss += (parts[0].log() - parts[1]).sum()
            found += (parts[1] == 0).sum()  # the label's logit is the peak itself
            if grad_hidden is None or grad_weight is None or grad_bias is None:
                continue
            logits.div_(parts[0][:, None])
            if used:
                logits.scatter_add_(1, index, -mine.to(logits.dtype)[:, None])
            grad_bias[:used] += logits.sum(dim=0)
            error = logits.to(hidden.dtype)
            grad_hidden[first : first + rows] = error @ kernel
            grad_weight[:used].addmm_(error.t(), states) if error.dtype == torch.float32 else grad_weight[:used].add_(
                error.t() @ states
            )
        if grad_hidden is not None and grad_weight is not None and grad_bias is not None:
            if group is not None:
                dist.all_reduce(grad_hidden, group=group)
            ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))
        return torch.stack((loss, found))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(saved * grads[0][0].to(saved.dtype) for saved in ctx.saved_tensors), None, None, None, None)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    vocabulary: tuple[int, int],
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[2] fp32: summed cross-entropy of softmax(hidden @ weight.T + bias), and rows whose label is the likeliest.

    hidden [N, h] and weight [V, h], bias [V] of this rank's slice; labels [N] int64 over the whole vocabulary.
    `vocabulary` is (first entry of the slice, entries of the whole vocabulary without padding). `group` shares the
    vocabulary by tensor parallelism; hidden is then the same on all its ranks and its gradient is summed over them.

    The gradient is formed with the loss, tile by tile, and scaled in backward: three products of logit size where
    recomputing takes four, and memory of one tile. (The idea is Liger-Kernel's fused linear cross-entropy.)
    """
    # Inside the function autograd is off, and its inputs want gradients even under no_grad.
    needs_grad = torch.is_grad_enabled()
    sums: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, vocabulary, group, needs_grad)
    return sums
