"""Model shapes for scaling studies: those of ModernBERT and Ettin, and others by one rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from transformers import ModernBertConfig

from configs.errors import InputError
from configs.units import format_count
from engine.modernbert.config import parameter_count

WIDTH_MULTIPLE = 16 * 8
"""Divisor of every width that the rule makes: FP8 products need multiples of 16 on each of up to 8 ranks."""
HEAD_SIZE = 64
"""Dimensions of a head, in the whole family."""
FAMILY = ((256, 7, 384), (384, 10, 576), (512, 19, 768), (768, 22, 1152), (1024, 28, 2624), (1792, 28, 3840))
"""Hidden size, layers and GLU size of Ettin 17M, 32M and 68M, ModernBERT base and large, and Ettin 1B."""
WIDTH_PER_LAYER = 36
"""Hidden size / number of layers. ModernBERT base and large and four of the six Ettin sizes lie between 34 and 38."""
TOLERANCE = 0.08
"""Largest relative distance between the wanted and the real parameter count."""


def model_shape(parameters: int, vocabulary: int) -> dict[str, int]:
    """Choose the `model` keys of a ModernBERT with about this many parameters.

    A count of the family gets the family's shape. For others width and depth grow together, and the GLU has 1.5 times
    the width. Heads have 64 dimensions.

    Args:
        parameters: Wanted count, with the tied embeddings counted once.
        vocabulary: Entries of the tokenizer.

    Raises:
        InputError: No shape comes within 8 %.
    """

    def fits(shape: dict[str, int]) -> bool:
        return abs(count(shape, vocabulary) / parameters - 1) <= TOLERANCE

    named = [shape for shape in (_shape(*sizes) for sizes in FAMILY) if fits(shape)]
    if named:
        return min(named, key=lambda shape: abs(count(shape, vocabulary) - parameters))
    fitting = [shape for shape in _shapes(parameters, vocabulary) if fits(shape)]
    if not fitting:
        smallest = format_count(count(_of_width(WIDTH_MULTIPLE, 2), vocabulary))
        raise InputError(
            f"parameters: no shape of {format_count(parameters)}; with a vocabulary of {vocabulary:,} the smallest "
            f"model has {smallest}; a smaller tokenizer allows smaller models",
            key="parameters",
        )
    return min(
        fitting, key=lambda shape: abs(math.log(shape["hidden_size"] / shape["num_hidden_layers"] / WIDTH_PER_LAYER))
    )


def count(shape: dict[str, int], vocabulary: int) -> int:
    """Count the parameters of a shape."""
    fields: dict[str, Any] = {**shape, "vocab_size": vocabulary}
    return parameter_count(ModernBertConfig(**fields))


def _shapes(parameters: int, vocabulary: int) -> Iterator[dict[str, int]]:
    """Yield for each width the depth that comes closest."""
    for hidden in range(WIDTH_MULTIPLE, 8192 + 1, WIDTH_MULTIPLE):
        one, two = (count(_of_width(hidden, layers), vocabulary) for layers in (1, 2))
        layers = 1 + round((parameters - one) / (two - one))
        if layers >= 2:
            yield _of_width(hidden, layers)


def _of_width(hidden: int, layers: int) -> dict[str, int]:
    return _shape(hidden, layers, -(-3 * hidden // 2 // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)


def _shape(hidden: int, layers: int, inner: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_SIZE,
    }
