"""Hugging Face's ModernBERT weights <-> ours: one mapping table and its inverse."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import ModernBertConfig

from configs.errors import InputError
from engine.megatron.names import global_name
from engine.modernbert.config import local_model, padded_vocabulary

if TYPE_CHECKING:
    from engine.modernbert.model import ModernBert

WeightSource = Callable[[str], Tensor]
"""Hugging Face parameter name -> the whole tensor."""
EMBEDDING = "model.embeddings.tok_embeddings.weight"


@dataclass(frozen=True)
class Row:
    """One line of the table; `{i}` is a layer number."""

    hf: str
    ours: str
    kind: Literal["plain", "vocabulary", "qkv", "glu"] = "plain"
    axis: int | None = None
    """The axis that tensor parallelism splits; None: every rank holds the whole."""


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
TIED = "output_layer.weight"
"""The last pipeline stage's own copy of the embedding, where it is not the first stage too."""


def parameters(architecture: ModernBertConfig) -> list[tuple[str, str, Row]]:
    """(Hugging Face name, our name, table row) of every parameter of a model."""
    rows = []
    for row in TABLE:
        layers: Iterable[int] = range(architecture.num_hidden_layers) if "{i}" in row.hf else (0,)
        for i in layers:
            if i == 0 and "attn_norm" in row.hf:
                continue  # the embedding norm serves the first layer
            rows.append((row.hf.format(i=i), row.ours.format(i=i), row))
    return rows


def to_ours(tensor: Tensor, row: Row, architecture: ModernBertConfig) -> Tensor:
    """A whole Hugging Face tensor -> a whole tensor of ours."""
    if row.kind == "qkv":  # [3, heads, dim] -> [heads, 3, dim], so that a slice of the rows is a slice of the heads
        heads = architecture.num_attention_heads
        return tensor.view(3, heads, -1, tensor.shape[-1]).transpose(0, 1).reshape(tensor.shape)
    if row.kind == "vocabulary":
        missing = padded_vocabulary(architecture.vocab_size) - tensor.shape[0]
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor


def to_hf(tensor: Tensor, row: Row, architecture: ModernBertConfig) -> Tensor:
    """The inverse of `to_ours`."""
    if row.kind == "qkv":
        heads = architecture.num_attention_heads
        return tensor.view(heads, 3, -1, tensor.shape[-1]).transpose(0, 1).reshape(tensor.shape)
    return tensor[: architecture.vocab_size] if row.kind == "vocabulary" else tensor


def shard(tensor: Tensor, row: Row, rank: int, size: int) -> Tensor:
    """This tensor-parallel rank's slice of a whole tensor of ours; each half of a gated layer is split by itself."""
    if row.axis is None or size == 1:
        return tensor
    if row.kind == "glu":
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, row.axis)[rank]


@torch.no_grad()
def load_weights(model: ModernBert, source: WeightSource) -> None:
    """Fill this rank's slice of the model, whatever the tensor- and pipeline-parallel layout."""
    architecture = model.architecture
    by_name = {ours: (hf, row) for hf, ours, row in parameters(architecture)}
    by_name[TIED] = by_name["embedding.word_embeddings.weight"]
    rank, size = model.tp_group.rank(), model.tp_group.size()
    for name, parameter in model.named_parameters():
        hf, row = by_name[global_name(model, name)]
        parameter.copy_(shard(to_ours(source(hf), row, architecture), row, rank, size))


def random_weights(architecture: ModernBertConfig, seed: int) -> WeightSource:
    """ModernBERT's initialisation (upstream `_init_weights`: truncated normals), a pure function of the seed."""
    shapes = _shapes(architecture)
    narrow = architecture.initializer_range
    deep = narrow / math.sqrt(2.0 * architecture.num_hidden_layers)

    def source(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        std = deep if name.endswith("Wo.weight") or name.startswith("head.") else narrow
        cut = architecture.initializer_cutoff_factor * std
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed << 32))
        return torch.nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -cut, cut, generator=generator)

    return source


def huggingface_weights(init: str, architecture: ModernBertConfig, seed: int) -> WeightSource:
    """The safetensors of a Hugging Face directory or hub id. A head that an encoder-only model lacks starts fresh."""
    folder = local_model(init)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    elif (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="pt") as handle:
            files = dict.fromkeys(handle.keys(), folder / "model.safetensors")
    else:
        raise InputError(
            f"model.init: {folder} holds no model.safetensors; pickled weights are refused: "
            "save the model again with transformers' save_pretrained"
        )
    shapes, fresh = _shapes(architecture), random_weights(architecture, seed)

    def source(name: str) -> Tensor:
        key = name if name in files else name.removeprefix("model.")
        if key not in files:
            if name.startswith(("head.", "decoder.")):
                return fresh(name)
            raise InputError(f"model.init: {folder} lacks the weight {name}; it is not a whole ModernBERT")
        with safe_open(files[key], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(key)
        if tuple(tensor.shape) != shapes[name]:
            raise InputError(
                f"model.init: {name} in {folder} has shape {tuple(tensor.shape)}, the model {shapes[name]}; "
                "remove the overrides of its shape under model"
            )
        return tensor

    return source


def _shapes(architecture: ModernBertConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape."""
    hidden, inner, vocabulary = architecture.hidden_size, architecture.intermediate_size, architecture.vocab_size
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
