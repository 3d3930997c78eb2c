"""The toy recipe that the tests of the engine and of the command line share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENIZER = str(Path(__file__).parent / "tokenizer")
"""Has 2,048 entries, learned from the TICO-19 sample (CC0). ModernBERT's 50,368 make a toy step four times as long."""


def toy_recipe(sources: list[dict[str, Any]], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """Six CLM and three MLM steps of a four-layer model; each of `changes` replaces whole sections, or keys in them."""
    tree: dict[str, Any] = {
        "name": "toy",
        "model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "local_attention": 32,
        },
        "tokenizer": TOKENIZER,
        "data": {"sequence_length": 128, "streams": 4, "sources": sources},
        "batch": {"sequences": 8, "micro": 2},
        "phases": [
            {"objective": "clm", "steps": 6, "lr": {"warmup": "2 steps"}},
            {"objective": "mlm", "steps": 3, "lr": {"shape": "1-sqrt", "final": 0.1}},
        ],
        # A large eps keeps Adam from turning the rounding of a vanishing gradient into a step of full size.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "precision": "fp32",
        "checkpoint": {"every": "2 steps"},
        "monitoring": {"every": "1 steps"},
    }
    for change in changes:
        for key, value in change.items():
            both = isinstance(tree.get(key), dict) and isinstance(value, dict)
            tree[key] = {**tree[key], **value} if both else value
    return tree
