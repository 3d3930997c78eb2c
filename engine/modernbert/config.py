"""The shape of a model: named sizes, Hugging Face configurations in the old and the new style, overrides."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import ModernBertConfig

from configs.errors import InputError
from configs.files import CHECKPOINT_RECORD
from configs.hub import download_snapshot, is_hub_id
from configs.schema import SCRATCH, Model, RunConfig
from datapipe.tokenizer import Tokenizer
from engine.modernbert.huggingface import OLD_STYLE, encoder_fields, every_n_layers, layer_types, rope_parameters
from monitoring.run_directory import RunDirectory

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4},
    "base": {"num_hidden_layers": 22, "hidden_size": 768, "intermediate_size": 1152, "num_attention_heads": 12},
    "large": {"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 2624, "num_attention_heads": 16},
}
CONFIG_FILE = CHECKPOINT_RECORD

VOCABULARY_MULTIPLE = 128
"""Multiple to which the vocabulary is padded, whatever the tensor-parallel size.

A checkpoint then fits every size up to 8, and each slice suits FP8. The added entries take no part in the loss and are
dropped at export.
"""


FIXED_BY_WEIGHTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_activation",
    "classifier_activation",
    "norm_bias",
    "norm_eps",
    "attention_bias",
    "mlp_bias",
    "decoder_bias",
    "tie_word_embeddings",
    "layer_types",
    "global_attn_every_n_layers",
)
"""Keys that trained weights depend on: an override that contradicts the file would drop or misread some of them."""
WEIGHT_FILES = (".pt", ".bin")
TRAINING_ONLY = ("attention_dropout", "attention_output_dropout", "embedding_dropout", "mlp_dropout")
"""Keys of a recipe's model section that change the training and neither the model nor its exported configuration."""


class DropoutRates(NamedTuple):
    """Shares of elements that training drops, and the seed of the choice."""

    seed: int
    embedding: float
    attention_output: float
    mlp: float


def resolve_architecture(
    model: Model, tokenizer: Tokenizer | None, published: Mapping[str, Any] | None = None
) -> ModernBertConfig:
    """Build the configuration of the model that a run trains.

    Args:
        model: The recipe's section: `size`, or `init` (a Hugging Face directory, hub id or checkpoint), and overrides.
        tokenizer: The run's tokenizer; it gives a new model its vocabulary and special ids. None: that of `init`.
        published: Fields of the configuration of `init`, or the vocabulary of a new model, known without their files.

    Raises:
        InputError: The shape cannot be built, the overrides contradict the weights, or the tokenizer does not fit.
    """
    overrides = model.model_dump(mode="json", exclude={"init", "size", *TRAINING_ONLY}, exclude_none=True)
    if model.init == SCRATCH:
        own = {"vocab_size": tokenizer.vocab_size, **special_ids(tokenizer)} if tokenizer else published
        fields: dict[str, Any] = {**(own or {}), **(SIZES[model.size] if model.size else {})}
    else:
        fields = read_config(model.init) if published is None else dict(published)
        _require_no_contradiction(overrides, fields, model.init)
    if "global_attn_every_n_layers" in overrides or "num_hidden_layers" in overrides:
        fields.pop("layer_types", None)  # they follow from the number of layers, which is no longer the file's
    for old, kind in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
        if old in overrides and fields.get("rope_parameters"):
            fields["rope_parameters"] = {**fields["rope_parameters"], kind: {"rope_theta": overrides.pop(old)}}
    architecture = build_config({**fields, **overrides}, "the recipe" if model.init == SCRATCH else model.init)
    _require_no_weight_dropout(model, architecture)
    if tokenizer is not None:
        _take_vocabulary(architecture, model, overrides, tokenizer)
    return architecture


def _take_vocabulary(
    architecture: ModernBertConfig, model: Model, overrides: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    """Give the model as many entries as the tokenizer has, if the recipe leaves the number open."""
    for key, number in special_ids(tokenizer).items():
        if overrides.get(key, number) != number:
            raise InputError(
                f"model.{key}: {overrides[key]}, but it is {number} in tokenizer {tokenizer.name}; remove model.{key}",
                key=f"model.{key}",
                code="other-special-token",
            )
    if model.init != SCRATCH and "vocab_size" not in overrides:  # the weights' new rows are made when they are read
        architecture.vocab_size = max(architecture.vocab_size, tokenizer.vocab_size)
    if architecture.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size: {architecture.vocab_size} entries, but tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size}; remove model.vocab_size, or set tokenizer to the model's own",
            key="model.vocab_size",
            code="tokenizer-too-large",
        )


def phase_architecture(architecture: ModernBertConfig, config: RunConfig, phase: int) -> ModernBertConfig:
    """Return the model's configuration in a phase: the last `global_rope_theta` that a phase so far has set holds."""
    thetas = [before.global_rope_theta for before in config.phases[: phase + 1] if before.global_rope_theta]
    if not thetas:
        return architecture
    fields = architecture.to_dict()
    rope = {**rope_parameters(architecture), "full_attention": {"rope_type": "default", "rope_theta": thetas[-1]}}
    return build_config({**fields, "rope_parameters": rope}, "the recipe")


def resolve_dropout(config: RunConfig, architecture: ModernBertConfig) -> DropoutRates | None:
    """Return the dropout of a run's training; None without dropout.

    A rate that the recipe does not give is that of the model's own configuration.
    """
    model = config.model
    embedding = architecture.embedding_dropout if model.embedding_dropout is None else model.embedding_dropout
    mlp = architecture.mlp_dropout if model.mlp_dropout is None else model.mlp_dropout
    rates = DropoutRates(config.seed, embedding, model.attention_output_dropout or 0.0, mlp)
    return rates if any(rates[1:]) else None


def _require_no_weight_dropout(model: Model, architecture: ModernBertConfig) -> None:
    """Refuse dropout on attention weights, and rates outside [0, 1) in the file."""
    rate = architecture.attention_dropout if model.attention_dropout is None else model.attention_dropout
    if rate:
        raise InputError(
            f"model.attention_dropout: {rate:g} would drop attention weights. The attention kernels draw such masks "
            "from a generator per device, so neither a resume nor another layout would repeat them. Set "
            f"model.attention_dropout=0, and model.attention_output_dropout={rate:g} for dropout on the attention's "
            "output, which is FlexBERT's attn_out_dropout_prob",
            key="model.attention_dropout",
            code="dropout-on-attention-weights",
        )
    for key in ("embedding_dropout", "mlp_dropout"):
        if getattr(model, key) is None and not 0 <= (rate := getattr(architecture, key)) < 1:
            raise InputError(
                f"model.{key}: the configuration of {model.init} has {rate}; set model.{key} to a share "
                "from 0 up to, but not including, 1",
                key=f"model.{key}",
                code="architecture-unsupported",
            )


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special ids of a ModernBertConfig, by the tokenizer."""
    return {
        "pad_token_id": tokenizer.pad_id,
        "cls_token_id": tokenizer.cls_id,
        "sep_token_id": tokenizer.sep_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }


def build_config(fields: Mapping[str, Any], origin: str) -> ModernBertConfig:
    """Build a ModernBertConfig and check that Detour can train it; `origin` is named in messages.

    Raises:
        InputError: A field has the wrong type or a value that Detour's ModernBERT does not have.
    """
    try:
        config = ModernBertConfig(**fields)
        _require_supported(config, origin)
    except InputError:
        raise
    except Exception as error:  # transformers raises type, value, key, attribute and dataclass errors of its own
        reason = " ".join(str(error).split())
        raise InputError(
            f"model: the configuration of {origin} cannot be used ({type(error).__name__}: {reason}); "
            "mend the value in its config.json or in the recipe's model section",
            key="model",
            code="config-invalid",
        ) from None
    return config


def read_config(init: str) -> dict[str, Any]:
    """Read the fields of a model's configuration, as those of an encoder.

    Args:
        init: A Hugging Face directory or hub id, a weight file with a config.json beside it, or a Detour checkpoint.

    Raises:
        InputError: There is no configuration, it is not readable, or it is not one of the ModernBERT family.
    """
    path = locate(init)
    folder = path.parent if path.is_file() else path
    if is_checkpoint(folder):
        config: dict[str, Any] = _read_json(folder / CONFIG_FILE)["architecture"]
        return config
    if not (folder / "config.json").is_file():
        beside = (
            f"put the model's config.json beside {path.name}"
            if path.is_file()
            else ("give a Hugging Face model directory, a hub id or a Detour checkpoint")
        )
        raise InputError(
            f"model.init: {folder} holds neither config.json nor {CONFIG_FILE}; {beside}",
            key="model.init",
            code="config-missing",
        )
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind == "modernbert-decoder":
        return encoder_fields(config)
    if kind != "modernbert":
        raise InputError(
            f"model.init: {init} is a model of type {kind!r}; Detour trains ModernBERT (model_type 'modernbert' or "
            "'modernbert-decoder')",
            key="model.init",
            code="model-type",
        )
    return config


def locate(init: str) -> Path:
    """Return the directory, or the weight file, of `model.init`; a hub id is downloaded.

    safetensors are taken where the repository has them, else its `pytorch_model.bin`.

    Raises:
        InputError: Nothing lies there.
    """
    path = Path(init).expanduser()
    run = RunDirectory(path)
    if run.config.is_file():
        raise InputError(
            f"model.init: {init} is a run directory; give its export, {run.export}, or a checkpoint, such as "
            f"{run.checkpoints / 'step-00000500'}",
            key="model.init",
            code="run-directory",
        )
    if path.is_dir() or (path.is_file() and path.suffix in WEIGHT_FILES):
        return path
    if not is_hub_id(init):
        raise InputError(
            f"model.init: no directory {init}; give an existing directory or a hub id such as org/model",
            key="model.init",
            code="model-missing",
        )
    return _downloaded(init)


@functools.cache
def _downloaded(hub_id: str) -> Path:
    """Download a model once per process: a start asks for it several times, and each answer of the hub costs time."""
    folder = download_snapshot(hub_id, ["*.json", "*.safetensors"], "model.init")
    if not list(folder.glob("*.safetensors")):
        folder = download_snapshot(hub_id, ["*.json", "pytorch_model*.bin"], "model.init")
    return folder


def is_checkpoint(path: Path) -> bool:
    """Return whether a directory is a Detour checkpoint."""
    return (path / CONFIG_FILE).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.init: {path} is not valid JSON ({error}); download or save the model again",
            key="model.init",
            code="config-invalid",
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"model.init: {path} holds a {type(content).__name__} and not a mapping; download or save the model again",
            key="model.init",
            code="config-invalid",
        )
    return content


def _require_no_contradiction(overrides: Mapping[str, Any], fields: Mapping[str, Any], init: str) -> None:
    """Refuse overrides that would drop or misread trained weights."""
    stored = build_config(fields, init)
    stored_pattern = {"global_attn_every_n_layers": every_n_layers(layer_types(stored))}
    for key in FIXED_BY_WEIGHTS:
        if key not in overrides:
            continue
        asked, trained = overrides[key], stored_pattern.get(key, getattr(stored, key, None))
        if asked != trained:
            raise InputError(
                f"model.{key}: {init} was trained with {trained!r}, and {asked!r} would change what its weights "
                "compute; remove the override, or train from scratch with model.size",
                key=f"model.{key}",
                code="override-contradicts",
            )


def padded_vocabulary(size: int) -> int:
    """Round a vocabulary up to a multiple of VOCABULARY_MULTIPLE."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def parameter_count(architecture: ModernBertConfig) -> int:
    """Count the parameters of the whole model; the tied decoder counts once."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    layers = architecture.num_hidden_layers * (4 * hidden * hidden + 3 * hidden * inner + 2 * hidden) - hidden
    return layers + architecture.vocab_size * (hidden + 1) + hidden * hidden + 3 * hidden


def _require_supported(config: ModernBertConfig, origin: str) -> None:
    """Refuse what Detour's ModernBERT does not compute, rather than leave trained parameters out."""

    def refuse(key: str, why: str) -> None:
        raise InputError(f"model.{key}: {origin}: {why}", key=f"model.{key}", code="architecture-unsupported")

    if getattr(config, "quantization_config", None):
        refuse(
            "quantization_config",
            "quantized weights cannot be trained; take the model in full precision, or remove this entry of its "
            "config.json if its weights are",
        )
    for key in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"):
        if getattr(config, key):
            refuse(key, "biases in norms, attention, MLP and head are not supported; take a model without them")
    if config.hidden_activation != "gelu":
        refuse("hidden_activation", f"only 'gelu' is supported, got {config.hidden_activation!r}")
    if config.classifier_activation not in ("gelu", "silu", "relu"):
        refuse("classifier_activation", f"the head knows gelu, silu and relu, got {config.classifier_activation!r}")
    for key in ("decoder_bias", "tie_word_embeddings"):
        if not getattr(config, key):
            refuse(key, "only a decoder that is tied to the embedding and has a bias is supported")
    if config.hidden_size % config.num_attention_heads or (config.hidden_size // config.num_attention_heads) % 2:
        refuse(
            "num_attention_heads",
            f"hidden_size {config.hidden_size} over {config.num_attention_heads} heads gives no even head dimension",
        )
    if len(layer_types(config)) != config.num_hidden_layers:
        refuse("layer_types", f"{len(layer_types(config))} entries for {config.num_hidden_layers} layers")
    if other := set(layer_types(config)) - {kind for _, kind in OLD_STYLE}:
        refuse("layer_types", f"a layer is full_attention or sliding_attention, got {', '.join(sorted(other))}")
    if config.local_attention < 0:
        refuse("local_attention", f"a window has 0 tokens or more, got {config.local_attention}")
    for kind, rope in rope_parameters(config).items():
        if rope.get("rope_type", "default") != "default":
            refuse("rope_parameters", f"{kind} asks for rope_type {rope['rope_type']!r}; only 'default' is supported")
        if not rope["rope_theta"] > 0:
            refuse("rope_parameters", f"{kind} has rope_theta {rope['rope_theta']}; it must be greater than 0")
