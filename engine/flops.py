"""Floating-point operations of a training step, by document length, attention window and label positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from transformers import ModernBertConfig


def training_flops(
    architecture: ModernBertConfig,
    lengths: ArrayLike,
    num_label_tokens: int,
    causal: bool,
    attention_weight: float = 1.0,
) -> float:
    """Count the FLOPs of one forward and backward pass. A multiply-add is two; backward costs twice the forward.

    Only matrix products count, as is usual for MFU: not norms, activations, softmax or RoPE. Padding and masked-out
    pairs of tokens do not count. Where attention is not causal, a global last layer leaves positions without a label
    out of all but the product of queries, keys and values. Labels count as spread evenly.

    Args:
        architecture: The model's configuration.
        lengths: Tokens of each document.
        num_label_tokens: Positions that carry a loss.
        causal: Whether attention is causal.
        attention_weight: Weight of attention's FLOPs in the sum.
    """
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    size = np.asarray(lengths, dtype=np.float64)
    weights = 4 * hidden * hidden + 3 * hidden * inner  # Wqkv, Wo; Wi has two halves, Wo one
    tokens = size.sum()
    linear = 2 * weights * tokens * architecture.num_hidden_layers
    half = architecture.local_attention // 2
    layer_types = list(architecture.layer_types or ())
    local_layers = layer_types.count("sliding_attention")
    global_layers = architecture.num_hidden_layers - local_layers
    pairs = global_layers * _pairs(size, np.inf, causal) + local_layers * _pairs(size, half, causal)
    if not causal and layer_types[-1:] == ["full_attention"]:
        left_out = 1 - num_label_tokens / tokens
        linear -= 2 * (weights - 3 * hidden * hidden) * tokens * left_out
        pairs -= _pairs(size, np.inf, causal) * left_out
    attention = 2 * 2 * hidden * pairs  # query by key, weights by value
    head = 2 * num_label_tokens * hidden * (hidden + architecture.vocab_size)
    return float(3 * (linear + attention_weight * attention + head))


def _pairs(size: np.ndarray, reach: float, causal: bool) -> float:
    """Count query-key pairs within `reach` tokens of each other, in documents of these sizes."""
    near = np.minimum(size - 1, reach)  # the farthest distance that occurs
    one_side = near * size - near * (near + 1) / 2  # pairs at distance 1..near, on one side
    return float((size + one_side * (1 if causal else 2)).sum())
