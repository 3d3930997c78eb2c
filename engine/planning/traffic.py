"""The collectives of one training step on one rank, by formula. A test counts them under a fake process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import ModernBertConfig

from engine.parallel import Layout
from engine.planning.stages import Stage

Kind = Literal["data", "tensor", "pipeline", "embedding"]
Operation = Literal["all-reduce", "reduce-scatter", "all-gather", "send"]


@dataclass(frozen=True)
class Transfer:
    """Equal collectives of a step."""

    kind: Kind
    operation: Operation
    calls: int
    elements: int
    """Elements of the whole tensor of one call."""
    element_bytes: int
    ranks: int
    """Ranks of the group."""

    @property
    def bytes_sent(self) -> float:
        """Bytes that a rank sends per step, in a ring."""
        share = {"all-reduce": 2 * (self.ranks - 1), "send": self.ranks}.get(self.operation, self.ranks - 1)
        return self.calls * self.elements * self.element_bytes * share / self.ranks


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step on one rank."""

    micro_batches: int
    tokens: int
    """Token slots of a micro-batch."""
    labels: int
    """Label positions of a micro-batch."""


def transfers(
    architecture: ModernBertConfig, layout: Layout, stage: Stage, step: StepShape, *, weight_bytes: int, recompute: bool
) -> list[Transfer]:
    """List what a rank of a stage sends per step. Tensors of fewer than `hidden_size` elements are left out.

    Left out as well are three numbers per label position, of the loss over a vocabulary that ranks share.

    Args:
        architecture: The model's configuration.
        layout: Sizes of the groups.
        stage: The rank's pipeline stage.
        step: Sizes of the step.
        weight_bytes: Bytes of a weight and of an activation. Gradients have 4.
        recompute: Whether layers are computed again in the backward pass.
    """
    found: list[Transfer] = []

    def add(kind: Kind, operation: Operation, ranks: int, calls: int, elements: int, size: int = weight_bytes) -> None:
        if calls and elements and ranks > 1:
            found.append(Transfer(kind, operation, calls, elements, size, ranks))

    for elements in stage.buckets:
        add("data", "reduce-scatter", layout.data, 1, elements, 4)
        add("data", "all-gather", layout.data, 1, elements)

    count, hidden, tensor = step.micro_batches, architecture.hidden_size, layout.tensor
    states, layers = step.tokens * hidden, stage.layers
    again = layers if recompute else 0  # forward passes of layers beyond the first
    if layout.sequence:
        # A column-parallel product gathers its input in forward, and again in backward for the weight's gradient.
        gathers = 6 * layers + 2 * again + stage.is_first + stage.is_last
        add("tensor", "all-gather", tensor, count * gathers, states)
        add("tensor", "reduce-scatter", tensor, count * (4 * layers + 2 * again + stage.is_first), states)
        add("tensor", "all-reduce", tensor, 1, stage.norm_weights, 4)
    else:
        add("tensor", "all-reduce", tensor, count * (4 * layers + 2 * again + stage.is_first), states)
    if stage.is_last:
        add("tensor", "all-reduce", tensor, count, step.labels * hidden, 4)  # gradient of the head's states

    if layout.pipeline > 1:
        own = states // tensor if layout.sequence else states
        add("pipeline", "send", layout.pipeline, count * ((not stage.is_first) + (not stage.is_last)), own)
        if stage.is_first or stage.is_last:
            add("embedding", "all-reduce", 2, 1, stage.embedding, 4)
    return found
