"""Cross-entropy of a linear layer, without ever holding the [tokens, vocabulary] logits.

The gradient is formed with the loss, tile by tile, and scaled in backward (the idea is Liger-Kernel's fused linear
cross-entropy, arXiv 2410.10989). That takes three products of logit size where recomputation takes four, and memory of
one tile. For a row with logits z, label y and lse = log sum exp z:

    loss = lse - z_y        d loss / d z_v = exp(z_v) / exp(lse) - [v = y]

Between the products a tile is touched twice, by `exp` and by its sum. To keep it so, the bias is a column of the
weight, the rows of states and gradients are divided by exp(lse), and the label's part is added outside the tile. A GPU
that has the whole vocabulary reads and writes a tile once instead: one kernel turns its logits into their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.modernbert.ops import exponentials_, softmax_minus_label_, takes_whole_rows

TILE_BYTES = {"cpu": 128 << 20, "cuda": 1600 << 20}
"""Largest block of logits held at once, on a GPU counted in fp32; enough rows for the products to run at full speed."""
SUMMED_ROWS = 1024
"""Rows of a bf16 gradient that a CPU adds to the fp32 sum at once: they stay in its cache as they are converted."""
SAFE_LOGIT = 60.0
"""Logits of at most this size need no shift before `exp`: neither `exp` nor its sum over a vocabulary overflows."""
EXTRA_COLUMNS = 8
"""Columns added to states and weight. The first carries the bias; eight keep the rows aligned.

On a GPU they are added to the states of the weight's gradient alone: a product of such a width is slower there, and
adding a bias to a product costs nothing.
"""


class Scratch:
    """Memory that the calls of one output layer share; nothing in it outlives a call.

    Fresh memory costs a CPU as much as a pass over it. A GPU's allocator keeps its own.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return uninitialised memory [rows, columns], which the next call with this name gets again."""
        if like.device.type != "cpu":
            return like.new_empty(rows, columns)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != like.dtype or buffer.numel() < rows * columns:
            buffer = self._buffers[name] = like.new_empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    vocabulary: tuple[int, int],
    group: dist.ProcessGroup | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Compute the summed cross-entropy of softmax(hidden @ weight.T + bias) and the number of correct predictions.

    Args:
        hidden: [N, h], the same on all ranks of `group`; its gradient is summed over them.
        weight: [V, h], this rank's slice of the vocabulary.
        bias: [V], likewise.
        labels: [N] int64 over the whole vocabulary.
        vocabulary: First entry of the slice, and entries of the whole vocabulary without padding.
        group: Tensor-parallel ranks that share the vocabulary.
        scratch: Memory to use again; default: fresh memory.

    Returns:
        [2] fp32: the loss, and the rows whose label is the likeliest entry, which are counted under `torch.no_grad`
        alone.
    """
    # Inside the function autograd is off, and its inputs want gradients even under no_grad.
    needs_grad = torch.is_grad_enabled()
    scratch = scratch or Scratch()
    sums: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, vocabulary, group, needs_grad, scratch)
    return sums


@dataclass(frozen=True)
class _Layer:
    """The linear layer and its inputs, prepared for tiles of rows."""

    hidden: Tensor
    """[N, h]"""
    states: Tensor
    """[N, h + EXTRA_COLUMNS]: hidden, a column of ones, zeros."""
    kernel: Tensor
    """[used, h] on a GPU; on a CPU [used, h + EXTRA_COLUMNS] with the bias."""
    bias: Tensor
    """[used]"""
    labels: Tensor
    """[N] int64 within the slice; 0 where the label lies on another rank."""
    is_local: Tensor
    """[N, 1], 1 where the label lies in this slice, else 0, in the dtype of `hidden`."""
    group: dist.ProcessGroup | None
    scratch: Scratch

    @classmethod
    def prepare(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        vocabulary: tuple[int, int],
        group: dist.ProcessGroup | None,
        scratch: Scratch,
    ) -> _Layer:
        start, size = vocabulary
        used = max(0, min(weight.shape[0], size - start))  # the rows that pad the vocabulary take no part
        width = hidden.shape[1]
        kernel = weight[:used]
        if not hidden.is_cuda:
            kernel = scratch.take("kernel", used, width + EXTRA_COLUMNS, weight)
            kernel[:, :width], kernel[:, width], kernel[:, width + 1 :] = weight[:used], bias[:used], 0.0
        states = hidden.new_zeros(len(hidden), width + EXTRA_COLUMNS)
        states[:, :width], states[:, width] = hidden, 1.0
        local = labels - start
        is_local = ((local >= 0) & (local < used)).to(hidden.dtype)[:, None]
        local = torch.where(is_local[:, 0] > 0, local, 0)
        return cls(hidden, states, kernel, bias[:used], local, is_local, group, scratch)

    @property
    def used(self) -> int:
        return self.kernel.shape[0]

    def tile_logits(self, rows: slice, tile: Tensor) -> Tensor:
        """[rows, used]: logits, written into the memory of `tile`."""
        logits = tile[: len(self.states[rows])]
        if self.hidden.is_cuda:
            torch.addmm(self.bias, self.hidden[rows], self.kernel.t(), out=logits)
        else:
            torch.mm(self.states[rows], self.kernel.t(), out=logits)
        return logits

    def tile_loss(self, rows: slice, logits: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
        """Turn a tile's logits into their exponentials, in place.

        Args:
            rows: Rows of the tile.
            logits: [rows, used]
            shifted: Subtract each row's largest logit first, over all ranks of the group.

        Returns:
            sum_exp: [rows, 1] fp32, over the whole vocabulary.
            label_logit: [rows, 1] fp32, shifted likewise.
        """
        is_local = self.is_local[rows]
        gathered = logits.gather(1, self.labels[rows, None]) if self.used else logits.new_zeros(len(logits), 1)
        label_logit, largest = gathered.float() * is_local, None
        if shifted:
            largest = (
                logits.amax(dim=1, keepdim=True).float() if self.used else torch.full_like(label_logit, -torch.inf)
            )
            if self.group is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
            label_logit -= largest * is_local
        sums = torch.cat((exponentials_(logits, largest), label_logit), dim=1)
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        sum_exp, label_logit = sums.split(1, dim=1)
        return sum_exp, label_logit

    def tile_gradients(
        self, rows: slice, exponentials: Tensor, sum_exp: Tensor, grad_hidden: Tensor, grad_kernel: Tensor
    ) -> None:
        """Write a tile's rows of `grad_hidden`, and add its share without the labels' part to `grad_kernel`."""
        width = self.hidden.shape[1]
        grad = (exponentials @ self.kernel) / sum_exp
        if self.used:  # a slice that is all padding has no row to look up
            grad -= self.kernel[self.labels[rows]] * self.is_local[rows]
        grad_hidden[rows] = grad[:, :width]
        scaled = (self.states[rows] / sum_exp).to(self.hidden.dtype)
        if self.hidden.dtype == torch.float32:
            grad_kernel[: self.used].addmm_(exponentials.t(), scaled)
        elif self.hidden.is_cuda:
            grad_kernel[: self.used] += exponentials.t() @ scaled
        else:
            product = self.scratch.take("product", self.used, scaled.shape[1], scaled)
            torch.mm(exponentials.t(), scaled, out=product)
            totals = grad_kernel[: self.used].split(SUMMED_ROWS)
            for total, part in zip(totals, product.split(SUMMED_ROWS), strict=True):
                total += part.float()  # because a sum of two formats takes several times as long

    def softmax_gradients(self, rows: slice, grad: Tensor, grad_hidden: Tensor, grad_kernel: Tensor) -> None:
        """Write a tile's rows of `grad_hidden`, and add its share to `grad_kernel`; `grad` is that of its logits."""
        grad_hidden[rows] = (grad @ self.kernel)[:, : self.hidden.shape[1]]
        grad_kernel[: self.used] += grad.t() @ self.states[rows]

    def is_safe(self) -> bool:
        """Whether no logit can exceed SAFE_LOGIT, by the Cauchy-Schwarz bound over all rows; equal on all ranks.

        A GPU is never asked: the host would wait for the answer, which costs more than the shift.
        """
        if self.states.device.type != "cpu" or not len(self.states):
            return False
        bound = self.states.norm(dim=1).max() * (self.kernel.norm(dim=1).max() if self.used else 0.0)
        if self.group is not None:
            dist.all_reduce(bound, op=dist.ReduceOp.MAX, group=self.group)
        return bool(bound <= SAFE_LOGIT)


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
        scratch: Scratch,
    ) -> Tensor:
        layer = _Layer.prepare(hidden, weight, bias, labels, vocabulary, group, scratch)
        width = hidden.shape[1]
        shifted = not needs_grad or not layer.is_safe()
        by_rows = group is None and takes_whole_rows(hidden)  # one rank has whole rows of logits, and a GPU caches them
        loss, correct = loss_and_correct = hidden.new_zeros((2,), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden if needs_grad else hidden[:0], dtype=torch.float32)
        grad_kernel = weight.new_zeros(len(weight) if needs_grad else 0, width + EXTRA_COLUMNS, dtype=torch.float32)
        height = _tile_rows(hidden, weight)
        tile = scratch.take("tile", min(height, len(hidden)), layer.used, hidden)
        for first in range(0, len(hidden), height):
            rows = slice(first, first + height)
            logits = layer.tile_logits(rows, tile)
            if by_rows:
                loss_and_correct += softmax_minus_label_(logits, layer.labels[rows], needs_grad).sum(dim=0)
                if needs_grad:
                    grad_logits = logits  # the loss has turned them into their gradient
                    layer.softmax_gradients(rows, grad_logits, grad_hidden, grad_kernel)
                continue
            sum_exp, label_logit = layer.tile_loss(rows, logits, shifted)
            loss += (sum_exp.log() - label_logit).sum()
            if shifted:
                correct += (label_logit == 0).sum()  # the label's logit is the largest itself
            if needs_grad:
                exponentials = logits  # the loss has turned them into exponentials
                layer.tile_gradients(rows, exponentials, sum_exp, grad_hidden, grad_kernel)
        if needs_grad:
            if layer.used and not by_rows:
                grad_kernel.index_add_(0, layer.labels, -(layer.states * layer.is_local).float())
            if group is not None:
                dist.all_reduce(grad_hidden, group=group)
            grads = (grad_hidden, grad_kernel[:, :width], grad_kernel[:, width])
            ctx.save_for_backward(*(grad.to(hidden.dtype) for grad in grads))
        return loss_and_correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, saved = grads[0][0], ctx.saved_tensors
        if scale.device.type != "cpu" or scale != 1:  # on a GPU the host would wait for the comparison
            saved = [grad * scale.to(grad.dtype) for grad in saved]
        return (*saved, None, None, None, None, None)


def _tile_rows(hidden: Tensor, weight: Tensor) -> int:
    entry = 4 if hidden.is_cuda else hidden.element_size()
    rows = max(1, TILE_BYTES[hidden.device.type] // (entry * weight.shape[0]))
    return rows - rows % 128 if hidden.is_cuda and rows > 128 else rows  # whole tiles of a GPU's matrix products
