"""`model`: initial weights and architecture."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from configs.schema.section import Section

SCRATCH = "scratch"
"""The `model.init` of a new model with random weights."""


class Model(Section):
    """Initial weights and architecture. A key without a value keeps the value of `init` or `size`."""

    init: str = SCRATCH
    """`scratch`, a Hugging Face directory, a hub id (`org/model` or `org/model@revision`), a weight file (`.pt`,
    `.bin`) with its config.json beside it, or a Detour checkpoint directory."""
    size: Literal["tiny", "base", "large"] | None = None
    """Named architecture of a new model. Only with `init: scratch`."""
    vocab_size: PositiveInt | None = None
    """Entries of the vocabulary. At least the tokenizer's. A tokenizer that extends that of `init` adds entries."""
    hidden_size: PositiveInt | None = None
    """Width of the hidden states."""
    intermediate_size: PositiveInt | None = None
    """Width of each half of the gated feed-forward layer."""
    num_hidden_layers: PositiveInt | None = None
    """Number of layers."""
    num_attention_heads: PositiveInt | None = None
    """Attention heads per layer. Must divide `hidden_size` into even parts."""
    hidden_activation: str | None = None
    """Activation of the feed-forward layers. Only `gelu` is supported."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence that the exported configuration announces."""
    initializer_range: PositiveFloat | None = None
    """Standard deviation of new weights."""
    initializer_cutoff_factor: PositiveFloat | None = None
    """Bound of new weights, in standard deviations."""
    norm_eps: PositiveFloat | None = None
    """Constant added to the variance in layer norms."""
    norm_bias: bool | None = None
    """Biases in layer norms. Only `false` is supported."""
    attention_bias: bool | None = None
    """Biases in attention. Only `false` is supported."""
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on attention weights. Only 0 is supported. It overrides the value of `init` in training."""
    attention_output_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the attention's output, in training. Without a value: 0. ModernBERT, Ettin and BioClinical-ModernBERT
    were trained with 0.1, which their FlexBERT recipes call `attn_out_dropout_prob`."""
    embedding_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the normalised embedding, in training. The exported configuration keeps the value of `init`."""
    mlp_bias: bool | None = None
    """Biases in feed-forward layers. Only `false` is supported."""
    mlp_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout between the matrices of feed-forward layers, in training. The exported configuration keeps the value of
    `init`."""
    decoder_bias: bool | None = None
    """Bias of the output vocabulary. Only `true` is supported."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    """Kind of attention per layer, instead of `global_attn_every_n_layers`."""
    local_attention: PositiveInt | None = None
    """Window of local attention in tokens, both sides together."""
    global_attn_every_n_layers: PositiveInt | None = None
    """Every n-th layer, from the first on, has global attention."""
    global_rope_theta: PositiveFloat | None = None
    """Base of the rotary embeddings in layers with global attention."""
    local_rope_theta: PositiveFloat | None = None
    """Base of the rotary embeddings in layers with local attention."""
    rope_parameters: dict[str, dict[str, Any]] | None = None
    """Rotary embeddings per kind of attention, as transformers 5 writes them. Only the default type is supported."""
    tie_word_embeddings: bool | None = None
    """One matrix for input embeddings and output vocabulary. Only `true` is supported."""
    pad_token_id: NonNegativeInt | None = None
    """Padding token of the exported configuration."""
    bos_token_id: NonNegativeInt | None = None
    """First token of a text, in the exported configuration."""
    eos_token_id: NonNegativeInt | None = None
    """Last token of a text, in the exported configuration."""
    cls_token_id: NonNegativeInt | None = None
    """Classification token of the exported configuration."""
    sep_token_id: NonNegativeInt | None = None
    """Separator token of the exported configuration."""
    classifier_pooling: Literal["cls", "mean"] | None = None
    """Pooling of a fine-tuned classifier, in the exported configuration."""
    classifier_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of a fine-tuned classifier, in the exported configuration."""
    classifier_bias: bool | None = None
    """Bias of the dense layer before the output vocabulary. Only `false` is supported."""
    classifier_activation: str | None = None
    """Activation of the dense layer before the output vocabulary: `gelu`, `silu` or `relu`."""

    @model_validator(mode="after")
    def _size_or_weights(self) -> Self:
        if self.size is not None and self.init != SCRATCH:
            raise ValueError("size names a new model and init names existing weights: give one of the two")
        if self.size is None and self.init == SCRATCH and self.hidden_size is None:
            raise ValueError("give init (a Hugging Face directory or hub id) or size (tiny, base, large)")
        return self
