"""Mapping between Hugging Face's ModernBERT weights and ours: one table and its inverse."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import ModernBertConfig

from configs.errors import InputError
from engine.megatron.names import global_name
from engine.modernbert.config import locate, padded_vocabulary
from engine.modernbert.pretrained import EMBEDDING, PretrainedWeights

if TYPE_CHECKING:
    from engine.modernbert.model import ModernBert

WeightSource = Callable[[str], Tensor]
"""Hugging Face parameter name -> the whole tensor."""
NewTokens = Mapping[int, Sequence[int]]
"""Id of a token that the weights do not know -> ids of the pieces of its text."""


@dataclass(frozen=True)
class Row:
    """One line of the table; `{i}` stands for a layer number."""

    hf: str
    ours: str
    kind: Literal["plain", "vocabulary", "qkv", "glu"] = "plain"
    axis: int | None = None
    """Axis that tensor parallelism splits; None: every rank holds the whole tensor."""


TABLE = (
    Row(EMBEDDING, "embedding.word_embeddings.weight", "vocabulary", 0),
    Row("model.embeddings.norm.weight", "embedding_norm.weight"),
    Row("model.layers.{i}.attn_norm.weight", "decoder.layers.{i}.input_layernorm.weight"),
    Row("model.layers.{i}.attn.Wqkv.weight", "decoder.layers.{i}.self_attention.linear_qkv.weight", "qkv", 0),
    Row("model.layers.{i}.attn.Wo.weight", "decoder.layers.{i}.self_attention.linear_proj.weight", axis=1),
    Row("model.layers.{i}.mlp_norm.weight", "decoder.layers.{i}.pre_mlp_layernorm.weight"),
    Row("model.layers.{i}.mlp.Wi.weight", "decoder.layers.{i}.mlp.linear_fc1.weight", "glu", 0),
    Row("model.layers.{i}.mlp.Wo.weight", "decoder.layers.{i}.mlp.linear_fc2.weight", axis=1),
    Row("model.final_norm.weight", "decoder.final_layernorm.weight"),
    Row("head.dense.weight", "lm_head.dense.weight"),
    Row("head.norm.weight", "lm_head.norm.weight"),
    Row("decoder.bias", "output_layer.bias", "vocabulary", 0),
)
VOCABULARY = frozenset(row.hf for row in TABLE if row.kind == "vocabulary")
"""Hugging Face names of the parameters that have a row per token."""
TIED = "output_layer.weight"
"""The last pipeline stage's own copy of the embedding, where it is not the first stage too."""


def parameters(architecture: ModernBertConfig) -> list[tuple[str, str, Row]]:
    """List (Hugging Face name, our name, table row) of every parameter of a model."""
    rows = []
    for row in TABLE:
        layers: Iterable[int] = range(architecture.num_hidden_layers) if "{i}" in row.hf else (0,)
        for i in layers:
            if i == 0 and "attn_norm" in row.hf:
                continue  # the embedding norm serves the first layer
            rows.append((row.hf.format(i=i), row.ours.format(i=i), row))
    return rows


def to_ours(tensor: Tensor, row: Row, architecture: ModernBertConfig) -> Tensor:
    """Turn a whole Hugging Face tensor into a whole tensor of ours."""
    if row.kind == "qkv":  # [3, heads, dim] -> [heads, 3, dim], so that a slice of the rows is a slice of the heads
        heads = architecture.num_attention_heads
        return tensor.view(3, heads, -1, tensor.shape[-1]).transpose(0, 1).reshape(tensor.shape)
    if row.kind == "vocabulary":
        missing = padded_vocabulary(architecture.vocab_size) - tensor.shape[0]
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor


def to_hf(tensor: Tensor, row: Row, architecture: ModernBertConfig) -> Tensor:
    """Invert `to_ours`."""
    if row.kind == "qkv":
        heads = architecture.num_attention_heads
        return tensor.view(heads, 3, -1, tensor.shape[-1]).transpose(0, 1).reshape(tensor.shape)
    return tensor[: architecture.vocab_size] if row.kind == "vocabulary" else tensor


def shard(tensor: Tensor, row: Row, rank: int, size: int) -> Tensor:
    """Cut out this tensor-parallel rank's slice of a whole tensor; each half of a gated layer is split alone."""
    if row.axis is None or size == 1:
        return tensor
    if row.kind == "glu":
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, row.axis)[rank]


@torch.no_grad()
def load_weights(model: ModernBert, source: WeightSource) -> None:
    """Fill this rank's slice of the model, in any tensor- and pipeline-parallel layout."""
    for parameter, tensor in rank_slices(model, source):
        parameter.copy_(tensor)


def rank_slices(
    model: ModernBert, source: WeightSource, starts: tuple[str, ...] = ("",)
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Yield this rank's parameters whose names begin so, each with its slice of the tensor in `source`."""
    architecture = model.architecture
    by_name = {ours: (hf, row) for hf, ours, row in parameters(architecture)}
    by_name[TIED] = by_name["embedding.word_embeddings.weight"]
    rank, size = model.tp_group.rank(), model.tp_group.size()
    for name, parameter in model.named_parameters():
        if name.startswith(starts):
            hf, row = by_name[global_name(model, name)]
            yield parameter, shard(to_ours(source(hf), row, architecture), row, rank, size)


def random_weights(architecture: ModernBertConfig, seed: int | str) -> WeightSource:
    """Initialise as ModernBERT does (truncated normals, transformers' `_init_weights`): a pure function of the seed."""
    shapes = parameter_shapes(architecture)
    narrow = architecture.initializer_range
    deep = narrow / math.sqrt(2.0 * architecture.num_hidden_layers)

    def source(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        std = deep if name.endswith("Wo.weight") or name.startswith("head.") else narrow
        cut = architecture.initializer_cutoff_factor * std
        # 32 bits hashed from both, because torch's generator takes no more than the low 32 bits of a seed.
        words = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(words, "little"))
        return torch.nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -cut, cut, generator=generator)

    return source


def huggingface_weights(
    init: str, architecture: ModernBertConfig, seed: int, new_tokens: NewTokens | None = None
) -> WeightSource:
    """Open the weights of a model of the family; a prediction head that an encoder lacks starts fresh.

    Args:
        init: `model.init`: a Hugging Face directory, hub id, or weight file.
        architecture: The model to fill.
        seed: Seed of a fresh head.
        new_tokens: Tokens whose rows are made from those of their pieces.

    Raises:
        InputError: The files do not hold exactly this model, or cannot be read. Reading a tensor raises it as well
            where values are not finite.
    """
    stored = open_weights(init, architecture, new_tokens)[0]
    fresh = random_weights(architecture, seed)

    def source(name: str) -> Tensor:
        if name not in stored:
            return fresh(name)
        tensor = stored.tensor(name)
        return _grown(tensor, architecture.vocab_size, new_tokens) if new_tokens and name in VOCABULARY else tensor

    return source


def _grown(rows: Tensor, size: int, new_tokens: NewTokens) -> Tensor:
    """Bring the rows of a vocabulary to `size`; the row of each new token is the mean of its pieces' rows, in fp32."""
    rows = rows.float()
    result = torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])
    for token_id, pieces in new_tokens.items():
        result[token_id] = (rows[list(pieces)] if pieces else rows).mean(dim=0)
    return result


def open_weights(
    init: str, architecture: ModernBertConfig, new_tokens: NewTokens | None = None
) -> tuple[PretrainedWeights, list[str]]:
    """Check that files and model agree, by headers alone; return the weights, and what a user should be told of them.

    Raises:
        InputError: As `huggingface_weights`.
    """
    stored = PretrainedWeights(locate(init))
    rows = stored.shape(EMBEDDING)[0] if new_tokens and EMBEDDING in stored else architecture.vocab_size
    shapes = parameter_shapes(architecture, min(rows, architecture.vocab_size))
    if new_tokens and max(max(pieces, default=0) for pieces in new_tokens.values()) >= rows:
        raise InputError(
            f"model.init: {init} has {rows:,} embeddings, fewer than its own tokenizer.json has tokens; take a whole "
            "model directory",
            key="model.init",
            code="weights-shape",
        )
    fresh = stored.require(shapes, [name for name in shapes if name.startswith(("head.", "decoder."))])
    notes = [f"{', '.join(fresh)}: not in the files, so they start fresh"] if fresh else []
    if dropped := stored.dropped():
        notes.append(f"{', '.join(dropped)}: a classifier takes no part in pretraining and is left out")
    return stored, notes


def parameter_shapes(architecture: ModernBertConfig, vocabulary: int | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its Hugging Face name; `vocabulary` replaces the model's own size."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    vocabulary = vocabulary or architecture.vocab_size
    by_suffix: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (vocabulary, hidden),
        "attn.Wqkv.weight": (3 * hidden, hidden),
        "attn.Wo.weight": (hidden, hidden),
        "mlp.Wi.weight": (2 * inner, hidden),
        "mlp.Wo.weight": (hidden, inner),
        "head.dense.weight": (hidden, hidden),
        "norm.weight": (hidden,),
        "decoder.bias": (vocabulary,),
    }
    names = (hf for hf, _, _ in parameters(architecture))
    return {name: next(shape for suffix, shape in by_suffix.items() if name.endswith(suffix)) for name in names}
