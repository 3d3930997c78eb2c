"""The shape of a model: named sizes, Hugging Face configurations in the old and the new style, overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import ModernBertConfig

from configs.errors import InputError
from configs.schema import Model
from datapipe.tokenizer import Tokenizer

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4},
    "base": {"num_hidden_layers": 22, "hidden_size": 768, "intermediate_size": 1152, "num_attention_heads": 12},
    "large": {"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 2624, "num_attention_heads": 16},
}
CONFIG_FILE = "detour.json"
"""Inside a Detour checkpoint: everything that is not a tensor."""

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to this multiple, whatever the tensor-parallel size: a checkpoint fits all of them, and each
of up to 8 slices suits FP8. The added entries take no part in the loss and are dropped at export."""


def resolve_architecture(model: Model, tokenizer: Tokenizer) -> ModernBertConfig:
    """The model a run trains, from `model.size`, a Hugging Face directory or hub id, or a checkpoint, plus overrides.

    Raises InputError where the shape cannot be built or the tokenizer does not fit it.
    """
    overrides = model.model_dump(exclude={"init", "size"}, exclude_none=True)
    if model.init == "scratch":
        ids = {"pad_token_id": tokenizer.pad_id, "cls_token_id": tokenizer.cls_id, "sep_token_id": tokenizer.sep_id}
        ids |= {"bos_token_id": tokenizer.cls_id, "eos_token_id": tokenizer.sep_id}
        base = SIZES[model.size] if model.size else {}
        fields: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, **ids, **base}
    else:
        fields = read_config(model.init)
    if "global_attn_every_n_layers" in overrides or "num_hidden_layers" in overrides:
        fields.pop("layer_types", None)  # they follow from the number of layers, which is no longer the file's
    for old, kind in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
        if old in overrides and "rope_parameters" in fields:
            fields["rope_parameters"] = {**fields["rope_parameters"], kind: {"rope_theta": overrides.pop(old)}}
    return _checked(ModernBertConfig(**{**fields, **overrides}), tokenizer)


def read_config(init: str) -> dict[str, Any]:
    """The config.json of a Hugging Face directory or hub id, or the one inside a Detour checkpoint."""
    folder = local_model(init)
    if (folder / CONFIG_FILE).is_file():
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["architecture"]
        return config
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"model.init: {folder} holds neither config.json nor {CONFIG_FILE}; "
            "give a Hugging Face model directory, a hub id or a Detour checkpoint"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"model.init: {folder / 'config.json'} is not valid JSON: {error}") from None
    kind = config.get("model_type")
    if kind != "modernbert":
        raise InputError(
            f"model.init: {init} is a model of type {kind!r}; Detour trains ModernBERT (model_type 'modernbert')"
        )
    return config


def local_model(init: str) -> Path:
    """The directory of `model.init`; a hub id is downloaded (safetensors only, never pickled weights)."""
    if Path(init).is_dir():
        return Path(init)
    if init.count("/") != 1 or init.startswith((".", "/", "~")):
        raise InputError(f"model.init: no directory {init}; give an existing directory or a hub id such as org/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(init, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.init: {init} is no directory here and cannot be had from the hub: {reason}") from None


def padded_vocabulary(size: int) -> int:
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def parameter_count(architecture: ModernBertConfig) -> int:
    """Parameters of the whole model, the tied decoder counted once."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    layers = architecture.num_hidden_layers * (4 * hidden * hidden + 3 * hidden * inner + 2 * hidden) - hidden
    return layers + architecture.vocab_size * (hidden + 1) + hidden * hidden + 3 * hidden


def _checked(config: ModernBertConfig, tokenizer: Tokenizer) -> ModernBertConfig:
    def refuse(key: str, why: str) -> None:
        raise InputError(f"model.{key}: {why}")

    for key in ("norm_bias", "attention_bias", "mlp_bias"):
        if getattr(config, key):
            refuse(key, "ModernBERT's layers have no biases here; set it to false")
    for key in ("attention_dropout", "embedding_dropout", "mlp_dropout"):
        if getattr(config, key):
            refuse(key, "dropout is not supported: ModernBERT is trained without it; set it to 0")
    if config.hidden_activation != "gelu":
        refuse("hidden_activation", f"only 'gelu' is supported, got {config.hidden_activation!r}")
    if config.classifier_activation not in ("gelu", "silu", "relu"):
        refuse("classifier_activation", f"the head knows gelu, silu and relu, got {config.classifier_activation!r}")
    if not (config.decoder_bias and config.tie_word_embeddings):
        refuse("decoder_bias, tie_word_embeddings", "only a tied decoder with a bias is supported; set both")
    if config.hidden_size % config.num_attention_heads or (config.hidden_size // config.num_attention_heads) % 2:
        refuse(
            "num_attention_heads",
            f"hidden_size {config.hidden_size} over {config.num_attention_heads} heads gives no even head dimension",
        )
    if len(config.layer_types) != config.num_hidden_layers:
        refuse("layer_types", f"{len(config.layer_types)} entries for {config.num_hidden_layers} layers")
    for kind, rope in config.rope_parameters.items():
        if rope.get("rope_type", "default") != "default":
            refuse("rope_parameters", f"{kind} asks for rope_type {rope['rope_type']!r}; only 'default' is supported")
    if config.vocab_size < tokenizer.vocab_size:
        refuse(
            "vocab_size",
            f"{config.vocab_size} entries, but tokenizer {tokenizer.name} has {tokenizer.vocab_size}; "
            "set tokenizer to the model's own",
        )
    return config
