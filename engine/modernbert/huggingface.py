"""The config.json of an export, from which every transformers since 4.48 builds the same model.

transformers 5 writes `rope_parameters` and `layer_types`. Older versions, and loaders in other languages, know only
`global_rope_theta`, `local_rope_theta` and `global_attn_every_n_layers`. Without them they take the base model's values
in silence. An export carries both styles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import ModernBertConfig, ModernBertDecoderConfig

ExportDtype = Literal["fp32", "bf16"]
DTYPES: dict[ExportDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
DECODER_ONLY = frozenset({"architectures", "use_cache", "sliding_window"})
"""Fields of a decoder's configuration that an encoder's does not have, or understands otherwise."""
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
OLD_STYLE = (
    ("global_rope_theta", "full_attention"),
    ("local_rope_theta", "sliding_attention"),
)


def encoder_config(architecture: ModernBertConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a `ModernBertForMaskedLM`, in both styles.

    Args:
        architecture: The trained model's.
        dtype: dtype of the exported weights.
    """
    config = architecture.to_diff_dict() | {"architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert"}
    return config | _both_styles(architecture, dtype)


def decoder_config(architecture: ModernBertConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a `ModernBertDecoderForCausalLM` that computes what the causal phase trained.

    A decoder's window counts the token itself, an encoder's does not: 64 tokens to the left are `local_attention: 128`
    in an encoder and `130` in a decoder (transformers halves both).
    """
    shared = {key: value for key, value in architecture.to_diff_dict().items() if hasattr(ModernBertDecoderConfig, key)}
    window = {"local_attention": architecture.local_attention // 2 * 2 + 2}
    names = {"architectures": ["ModernBertDecoderForCausalLM"], "model_type": "modernbert-decoder"}
    styles = _both_styles(architecture, dtype)
    return shared | window | names | styles | {"use_cache": True}


def encoder_fields(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the config.json of a `ModernBertDecoderForCausalLM` into the fields of the encoder with the same window."""
    # An encoder's configuration takes its window from `sliding_window` too, which means another one there.
    fields = {key: value for key, value in decoder.items() if key not in DECODER_ONLY}
    window = int(fields.get("local_attention") or 128)
    return fields | {"model_type": "modernbert", "local_attention": (window // 2 - 1) * 2}


def decoder_weights(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of a `ModernBertDecoderForCausalLM` that one tensor of a `ModernBertForMaskedLM` becomes."""
    if name.endswith("attn.Wqkv.weight"):
        stem = name.removesuffix("Wqkv.weight")
        parts = (part.contiguous() for part in tensor.chunk(3))
        return {f"{stem}{letter}_proj.weight": part for letter, part in zip("qkv", parts, strict=True)}
    return {name.replace("head.", "lm_head.", 1) if name.startswith("head.") else name: tensor}


def every_n_layers(kinds: Sequence[str]) -> int | None:
    """The n of "every n-th layer is global, from the first on"; None for a pattern that older versions cannot say."""
    for n in range(1, len(kinds) + 1):
        if all((kind == "full_attention") == (i % n == 0) for i, kind in enumerate(kinds)):
            return n
    return None


def rope_parameters(architecture: ModernBertConfig) -> Mapping[str, Mapping[str, Any]]:
    """RoPE's parameters by kind of layer; transformers fills them in when it builds a configuration."""
    parameters: Any = architecture.rope_parameters
    return dict(parameters)


def layer_types(architecture: ModernBertConfig) -> list[str]:
    """Kind of each layer; transformers fills them in when it builds a configuration."""
    return list(architecture.layer_types or ())


def _both_styles(architecture: ModernBertConfig, dtype: torch.dtype) -> dict[str, Any]:
    rope = rope_parameters(architecture)
    thetas = {old: float(rope[kind]["rope_theta"]) for old, kind in OLD_STYLE}
    n = every_n_layers(layer_types(architecture))
    pattern = {} if n is None else {"global_attn_every_n_layers": n}
    return thetas | pattern | {"dtype": NAMES[dtype], "torch_dtype": NAMES[dtype]}
