"""The GPU memory of a training step, by formula. It was compared with the few measured sizes, not measured itself."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import ModernBertConfig

from engine.modernbert.config import padded_vocabulary
from engine.modernbert.linear_cross_entropy import TILE_BYTES
from engine.parallel import Layout
from engine.planning.stages import Stage

HALF, FULL = 2, 4
"""Bytes of a number in BF16 and in FP32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part."""

    weights: float
    """BF16."""
    gradients: float
    """FP32, of all weights."""
    optimizer: float
    """This rank's share of FP32 main weights and two moments."""
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
    recompute: bool,
) -> Memory:
    """Compute the peak memory of a rank.

    Per token a layer keeps 8 vectors of the hidden size (both residual sums, both norms, q, k, v, the attention's
    output) and 3 of the MLP's inner size (both halves before the gate, their product). Tensor parallelism divides q, k,
    v, the output and the inner vectors, sequence parallelism the others too. With recomputation a layer keeps its
    input, and one layer at a time the rest.

    Args:
        architecture: The model's configuration.
        layout: Sizes of the groups.
        stage: The rank's pipeline stage.
        tokens: Token slots of a micro-batch.
        label_share: Share of the tokens that carry a label.
        micro_batches: Micro-batches of a step on a rank.
        recompute: Whether layers are computed again in the backward pass.
    """
    hidden, inner, tensor = architecture.hidden_size, architecture.intermediate_size, layout.tensor
    whole = hidden / tensor if layout.sequence else hidden  # channels of a vector between the parallel products
    layer = HALF * (4 * whole + (4 * hidden + 3 * inner) / tensor) + FULL * architecture.num_attention_heads / tensor
    kept = stage.layers * (HALF * whole if recompute else layer) + HALF * whole * stage.is_first
    under_way = min(micro_batches, layout.pipeline - stage.index)
    head = 0.0
    if stage.is_last:
        labels, vocabulary = label_share * tokens, padded_vocabulary(architecture.vocab_size) / tensor
        tile = min(labels * vocabulary * HALF, TILE_BYTES["cuda"] * HALF / FULL)
        # Six states and gradients in BF16 and one in FP32 per label; the decoder's gradient in FP32 and twice in BF16.
        head = labels * hidden * (6 * HALF + FULL) + vocabulary * hidden * (FULL + 2 * HALF) + tile
    working = layer if recompute else 0.0
    working += HALF * (2 * whole + 3 * inner / tensor)
    return Memory(
        weights=HALF * stage.elements,
        gradients=FULL * stage.elements,
        optimizer=3 * FULL * stage.elements / layout.data,
        activations=under_way * tokens * kept,
        head=head,
        temporary=tokens * working,
    )


def checkpoint_bytes(parameters: int) -> int:
    """Return the bytes of a checkpoint: weights in BF16; main weights and two moments in FP32."""
    return parameters * (HALF + 3 * FULL)
