"""Floating-point operations a training step needs, counted by document length, attention window and paid positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from transformers import ModernBertConfig


def training_flops(architecture: ModernBertConfig, lengths: ArrayLike, paying: int, causal: bool) -> float:
    """FLOPs of one forward and backward pass over documents of these lengths, `paying` positions of which pay loss.

    A multiply-add counts as two. Backward costs twice the forward. Only matrix products count, as is usual for MFU
    (norms, activations, softmax and RoPE are left out), and only real work: neither padding nor masked-out pairs.
    """
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    size = np.asarray(lengths, dtype=np.float64)
    weights = 4 * hidden * hidden + 3 * hidden * inner  # Wqkv, Wo; Wi has two halves, Wo one
    linear = 2 * weights * size.sum() * architecture.num_hidden_layers
    half = architecture.local_attention // 2
    local_layers = sum(kind == "sliding_attention" for kind in architecture.layer_types)
    global_layers = architecture.num_hidden_layers - local_layers
    pairs = global_layers * _pairs(size, np.inf, causal) + local_layers * _pairs(size, half, causal)
    attention = 2 * 2 * hidden * pairs  # query by key, weights by value
    head = 2 * paying * hidden * (hidden + architecture.vocab_size)
    return float(3 * (linear + attention + head))


def _pairs(size: np.ndarray, reach: float, causal: bool) -> float:
    """Query-key pairs within `reach` tokens of each other inside documents of these sizes."""
    near = np.minimum(size - 1, reach)  # the farthest distance that occurs
    one_side = near * size - near * (near + 1) / 2  # pairs at distance 1..near, on one side
    return float((size + one_side * (1 if causal else 2)).sum())
