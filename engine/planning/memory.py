"""The GPU memory of a training step, by formula. It was compared with the few measured sizes, not measured itself."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import ModernBertConfig

from engine.modernbert.config import padded_vocabulary
from engine.modernbert.linear_cross_entropy import TILE_BYTES
from engine.parallel import Layout
from engine.planning.stages import Stage

FULL = 4
"""Bytes of a number in FP32."""
WIDTH = {"fp32": FULL, "bf16": 2, "fp8": 2}
"""Bytes of a weight and of an activation, by precision."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part."""

    weights: float
    """In the computing dtype."""
    gradients: float
    """FP32, of all weights."""
    optimizer: float
    """This rank's share of two moments, and of FP32 main weights unless the weights are FP32 themselves."""
    activations: float
    """Kept from forward to backward, by the micro-batches that are under way at once."""
    head: float
    """Prediction head and a tile of logits."""
    temporary: float
    """The layer that is being computed."""

    @property
    def state(self) -> float:
        """Bytes that are there before any step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Bytes at the peak of a step."""
        return self.state + self.activations + self.head + self.temporary


def step_memory(
    architecture: ModernBertConfig,
    layout: Layout,
    stage: Stage,
    tokens: int,
    label_share: float,
    micro_batches: int,
    *,
    width: int,
    recompute: bool,
) -> Memory:
    """Compute the peak memory of a rank.

    A layer keeps 8 vectors of the hidden size per token: both residual sums, both norms, q, k, v and the attention's
    output. It keeps 3 vectors of the MLP's inner size: both halves before the gate, and their product. Tensor
    parallelism divides q, k, v, the output and the inner vectors. Sequence parallelism divides the others too. With
    recomputation each layer keeps its input, and one layer at a time keeps the rest.

    Args:
        architecture: The model's configuration.
        layout: Sizes of the groups.
        stage: The rank's pipeline stage.
        tokens: Token slots of a micro-batch.
        label_share: Share of the tokens that carry a label.
        micro_batches: Micro-batches of a step on a rank.
        width: Bytes of a weight and of an activation.
        recompute: Whether layers are computed again in the backward pass.
    """
    hidden, inner, tensor = architecture.hidden_size, architecture.intermediate_size, layout.tensor
    whole = hidden / tensor if layout.sequence else hidden  # channels of a vector between the parallel products
    layer = width * (4 * whole + (4 * hidden + 3 * inner) / tensor) + FULL * architecture.num_attention_heads / tensor
    kept = stage.layers * (width * whole if recompute else layer) + width * whole * stage.is_first
    under_way = min(micro_batches, layout.pipeline - stage.index)
    head = 0.0
    if stage.is_last:
        labels, vocabulary = label_share * tokens, padded_vocabulary(architecture.vocab_size) / tensor
        tile = min(labels * vocabulary * width, TILE_BYTES["cuda"] * width / FULL)
        # Six states and gradients and one in FP32 per label; the decoder's gradient in FP32, and two copies.
        head = labels * hidden * (6 * width + FULL) + vocabulary * hidden * (FULL + 2 * width) + tile
    working = layer if recompute else 0.0
    working += width * (2 * whole + 3 * inner / tensor)
    return Memory(
        weights=width * stage.elements,
        gradients=FULL * stage.elements,
        optimizer=(3 if width < FULL else 2) * FULL * stage.elements / layout.data,
        activations=under_way * tokens * kept,
        head=head,
        temporary=tokens * working,
    )


def checkpoint_bytes(parameters: int, width: int) -> int:
    """Return the bytes of a checkpoint: weights in the computing dtype; main weights and two moments in FP32."""
    return parameters * (width + 3 * FULL)
