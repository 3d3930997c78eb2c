"""Names of layers and parameters over all pipeline stages."""

from __future__ import annotations

from typing import Any


def global_name(model: Any, name: str) -> str:
    """Return a parameter's or module's name with the layer counted over the whole model, not this pipeline stage.

    Relies on `get_transformer_layer_offset(config)` of Megatron 0.16.1 and 0.19.2.
    """
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    if not name.startswith("decoder.layers."):
        return name
    _, _, layer, rest = name.split(".", 3)
    return f"decoder.layers.{int(layer) + get_transformer_layer_offset(model.config)}.{rest}"
