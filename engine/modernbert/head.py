"""Cross-entropy of a linear layer, without ever holding the [tokens, vocabulary] logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.modernbert.fused import exponentials_

TILE_BYTES = {"cpu": 128 << 20, "cuda": 1600 << 20}
"""Largest block of logits held at once, as if in fp32: enough rows for the matrix products to run at full speed."""
SAFE = 60.0
"""Logits of at most this size need no shift before `exp`: neither it nor the sum over a vocabulary overflows."""
EXTRA = 8
"""Columns added to states and weight, of which the first carries the bias; so many keep rows aligned.

On a GPU to the states of the weight's gradient alone: a product of such a width is slower there by more than a fifth,
and adding a bias to one costs nothing.
"""


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
        width = hidden.shape[1]
        on_gpu, kernel = hidden.is_cuda, weight[:used]
        if not on_gpu:
            kernel = _scratch("kernel", used, width + EXTRA, weight)
            kernel[:, :width], kernel[:, width], kernel[:, width + 1 :] = weight[:used], bias[:used], 0.0
        states = hidden.new_zeros(len(hidden), width + EXTRA)
        states[:, :width], states[:, width] = hidden, 1.0
        local = labels - start
        mine = ((local >= 0) & (local < used)).to(hidden.dtype)[:, None]
        local = torch.where(mine[:, 0] > 0, local, 0)
        shifted = not needs_grad or not _are_small(states, kernel, group)
        loss, found = hidden.new_zeros((2,), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if needs_grad else None
        whole = weight.new_zeros(len(weight), width + EXTRA, dtype=torch.float32) if needs_grad else None
        rows = max(1, TILE_BYTES[hidden.device.type] // (4 * weight.shape[0]))
        rows -= rows % 128 if on_gpu and rows > 128 else 0  # whole tiles of its products
        tile = _scratch("tile", min(rows, hidden.shape[0]), used, hidden)
        for first in range(0, hidden.shape[0], rows):
            part = slice(first, first + rows)
            powers = tile[: len(states[part])]
            if on_gpu:
                torch.addmm(bias[:used], hidden[part], kernel.t(), out=powers)
            else:
                torch.mm(states[part], kernel.t(), out=powers)
            target = (powers.gather(1, local[part, None]) if used else powers.new_zeros(len(powers), 1)).float()
            target, peak = target * mine[part], None
            if shifted:
                peak = powers.amax(dim=1, keepdim=True).float() if used else torch.full_like(target, -torch.inf)
                if group is not None:
                    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
                target -= peak * mine[part]
            sums = torch.cat((exponentials_(powers, peak), target), dim=1)
            if group is not None:
                dist.all_reduce(sums, group=group)
            total, target = sums.split(1, dim=1)
            loss += (total.log() - target).sum()
            if shifted:
                found += (target == 0).sum()  # the label's logit is the peak itself
            if grad_hidden is None or whole is None:
                continue
            own = kernel[local[part]] * mine[part]
            grad_hidden[part] = ((powers @ kernel) / total - own)[:, :width]
            scaled = (states[part] / total).to(hidden.dtype)
            if hidden.dtype == torch.float32:
                whole[:used].addmm_(powers.t(), scaled)
            else:
                whole[:used] += powers.t() @ scaled
        if grad_hidden is not None and whole is not None:
            if used:
                whole.index_add_(0, local, -(states * mine).float())
            if group is not None:
                dist.all_reduce(grad_hidden, group=group)
            grads = (grad_hidden, whole[:, :width], whole[:, width])
            ctx.save_for_backward(*(grad.to(hidden.dtype) for grad in grads))
        return torch.stack((loss, found))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, saved = grads[0][0], ctx.saved_tensors
        if scale.device.type != "cpu" or scale != 1:  # on a GPU the host would wait for the answer
            saved = [grad * scale.to(grad.dtype) for grad in saved]
        return (*saved, None, None, None, None)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    vocabulary: tuple[int, int],
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[2] fp32: summed cross-entropy of softmax(hidden @ weight.T + bias), and rows whose label is the likeliest, which
    are counted under `torch.no_grad` alone.

    hidden [N, h] and weight [V, h], bias [V] of this rank's slice; labels [N] int64 over the whole vocabulary.
    `vocabulary` is (first entry of the slice, entries of the whole vocabulary without padding). `group` shares the
    vocabulary by tensor parallelism; hidden is then the same on all its ranks and its gradient is summed over them.

    The gradient is formed with the loss, tile by tile, and scaled in backward: three products of logit size where
    recomputing takes four, and memory of one tile. (The idea is Liger-Kernel's fused linear cross-entropy.) Between the
    products a tile is touched twice, by `exp` and its sum: the bias is a column of the weight, what divides a row's
    probabilities divides its states and its gradient instead, and the label's part is added outside.
    """
    # Inside the function autograd is off, and its inputs want gradients even under no_grad.
    needs_grad = torch.is_grad_enabled()
    sums: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, vocabulary, group, needs_grad)
    return sums


def _are_small(states: Tensor, kernel: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether no logit can exceed SAFE, by the Cauchy-Schwarz bound over all rows; the same on every rank of a group.

    On a GPU reading the answer would make the host wait for the device, which costs more than the shift.
    """
    if states.device.type != "cpu" or not len(states):
        return False
    bound = states.norm(dim=1).max() * (kernel.norm(dim=1).max() if len(kernel) else 0.0)
    if group is not None:
        dist.all_reduce(bound, op=dist.ReduceOp.MAX, group=group)
    return bool(bound <= SAFE)


_kept: dict[str, Tensor] = {}


def _scratch(name: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """Uninitialised memory [rows, columns] that the next call with this name takes again.

    A CPU's fresh memory costs as much as a pass over it; a GPU's allocator keeps its own.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    kept = _kept.get(name)
    if kept is None or kept.dtype != like.dtype or kept.numel() < rows * columns:
        kept = _kept[name] = like.new_empty(rows * columns)
    return kept[: rows * columns].view(rows, columns)
