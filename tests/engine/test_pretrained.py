"""Weights of the family under one set of names: formats, wrappers, decoders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)

from configs.errors import InputError
from engine.modernbert.convert import parameter_shapes
from engine.modernbert.pretrained import EMBEDDING, PretrainedWeights, canonical_name

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
HEAD = ("head.dense.weight", "head.norm.weight", "decoder.bias")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model")
    ModernBertForMaskedLM(ModernBertConfig(**SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture
def weights(model_directory: Path) -> dict[str, torch.Tensor]:
    return load_file(model_directory / "model.safetensors")


def _same(found: PretrainedWeights, expected: dict[str, torch.Tensor]) -> None:
    shapes = parameter_shapes(ModernBertConfig(**SHAPE))
    assert found.require(shapes, ()) == []
    for name in shapes:
        torch.testing.assert_close(found.tensor(name), expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.layers.0.attn.Wqkv.weight", "model.layers.0.attn.Wqkv.weight"),
        ("layers.0.attn.Wqkv.weight", "model.layers.0.attn.Wqkv.weight"),
        ("module._orig_mod.model.layers.3.mlp.Wi.weight", "model.layers.3.mlp.Wi.weight"),
        ("model.layers.1._orig_mod.mlp_norm.weight", "model.layers.1.mlp_norm.weight"),
        ("model.model.embeddings.tok_embeddings.weight", EMBEDDING),
        ("model.bert.encoder.layers.2.attn.Wo.weight", "model.layers.2.attn.Wo.weight"),
        ("model.bert.final_norm.weight", "model.final_norm.weight"),
        ("model.head.dense.weight", "head.dense.weight"),
        ("lm_head.norm.weight", "head.norm.weight"),
        ("_orig_mod.decoder.bias", "decoder.bias"),
        ("classifier.weight", "classifier.weight"),
    ],
)
def test_wrappers_are_taken_off(key: str, name: str) -> None:
    assert canonical_name(key) == name


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "model.", "module._orig_mod."])
def test_every_format_and_prefix_reads_alike(prefix: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    for kind in ("safetensors", "bin", "parts", "bin-parts", "old-bin"):
        (tmp_path / kind).mkdir()
    save_file(wrapped, tmp_path / "safetensors" / "model.safetensors")
    torch.save(wrapped, tmp_path / "bin" / "pytorch_model.bin")
    torch.save(wrapped, tmp_path / "old-bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    names = sorted(wrapped)
    halves = [{name: wrapped[name] for name in names[::2]}, {name: wrapped[name] for name in names[1::2]}]
    for folder, stem, save in (
        ("parts", "model.safetensors", save_file),
        ("bin-parts", "pytorch_model.bin", torch.save),
    ):
        files = {}
        for number, half in enumerate(halves):
            save(half, tmp_path / folder / f"{number}-{stem}")
            files |= dict.fromkeys(half, f"{number}-{stem}")
        (tmp_path / folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": files}))
    for kind in ("safetensors", "bin", "parts", "bin-parts", "old-bin"):
        _same(PretrainedWeights(tmp_path / kind), weights)


def test_a_whole_file_beside_an_old_index_is_read(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """transformers does so: a model was saved whole over one in parts."""
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "1.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(weights, tmp_path / "model.safetensors")
    _same(PretrainedWeights(tmp_path), weights)


def test_composer_checkpoint_of_flexbert(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    flex = {}
    for name, tensor in weights.items():
        name = name.replace("model.layers.", "model.encoder.layers.").replace("model.", "bert.", 1)
        flex[f"model.{name}"] = tensor
    flex["model.decoder.weight"] = weights[EMBEDDING].clone()
    file = tmp_path / "ep0-ba52988-rank0.pt"
    torch.save({"state": {"model": flex, "timestamp": {"Timestamp": {"batch": 52988}}}, "rng": []}, file)
    _same(PretrainedWeights(file), weights)


def test_a_decoders_projections_become_one(tmp_path: Path) -> None:
    torch.manual_seed(4)
    decoder = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**SHAPE))
    decoder.save_pretrained(tmp_path)
    found = PretrainedWeights(tmp_path)
    shapes = parameter_shapes(ModernBertConfig(**SHAPE))
    assert found.require(shapes, ()) == []
    attention = decoder.model.layers[1].attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    torch.testing.assert_close(found.tensor("model.layers.1.attn.Wqkv.weight"), torch.cat(parts), rtol=0, atol=0)
    torch.testing.assert_close(found.tensor("head.dense.weight"), decoder.lm_head.dense.weight, rtol=0, atol=0)


def test_a_classifier_is_dropped_by_name(tmp_path: Path) -> None:
    ModernBertForSequenceClassification(ModernBertConfig(**SHAPE, num_labels=3)).save_pretrained(tmp_path)
    found = PretrainedWeights(tmp_path)
    assert found.require(parameter_shapes(ModernBertConfig(**SHAPE)), HEAD) == ["decoder.bias"]
    assert sorted(found.dropped()) == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize(
    "surplus",
    [
        "model.layers.1.attn_norm.bias",
        "model.layers.1.mlp.Wi.bias",
        "model.layers.4.mlp_norm.weight",
        "model.layers.0.attn_norm.weight",
        "head.dense.bias",
    ],
)
def test_a_weight_the_model_does_not_take_is_named(
    surplus: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file({**weights, surplus: torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as refusal:
        PretrainedWeights(tmp_path).require(parameter_shapes(ModernBertConfig(**SHAPE)), HEAD)
    assert refusal.value.code == "weights-unread"
    assert surplus in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_quantized_weights_are_refused(
    dtype: torch.dtype, name: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """They are other weights without their scales."""
    key = "model.layers.1.mlp.Wi.weight"
    (save_file if name.endswith("safetensors") else torch.save)(
        {**weights, key: weights[key].to(dtype)}, tmp_path / name
    )
    with pytest.raises(InputError, match=key) as refusal:
        PretrainedWeights(tmp_path).require(parameter_shapes(ModernBertConfig(**SHAPE)), HEAD)
    assert refusal.value.code == "weights-quantized"


def test_an_untied_decoder_is_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({**weights, "decoder.weight": weights[EMBEDDING] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as refusal:
        PretrainedWeights(tmp_path).require(parameter_shapes(ModernBertConfig(**SHAPE)), HEAD)
    assert refusal.value.code == "weights-untied"


def test_values_that_are_not_finite_are_named(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    name = "model.layers.2.mlp.Wo.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as refusal:
        PretrainedWeights(tmp_path).tensor(name)
    assert refusal.value.code == "weights-not-finite"
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("pointer", "git-lfs-pointer"),
        ("truncated", "weights-damaged"),
        ("empty", "weights-damaged"),
        ("pickle", "weights-damaged"),
        ("index", "weights-damaged"),
        ("shard", "weights-missing"),
        ("nothing", "weights-missing"),
        ("lacking", "weights-missing"),
        ("shape", "weights-shape"),
        ("twice", "weights-ambiguous"),
    ],
)
def test_damage_is_told_by_its_kind(
    damage: str, code: str, weights: dict[str, torch.Tensor], model_directory: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    if damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif damage == "truncated":
        file.write_bytes((model_directory / file.name).read_bytes()[:-100])
    elif damage == "empty":
        file.touch()
    elif damage == "pickle":
        torch.save({"weight": weights, "code": Path}, tmp_path / "pytorch_model.bin")
    elif damage == "index":
        (tmp_path / "model.safetensors.index.json").write_text("[1]")
    elif damage == "shard":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    elif damage == "lacking":
        save_file({name: tensor for name, tensor in weights.items() if ".2." not in name}, file)
    elif damage == "shape":
        save_file({**weights, "head.dense.weight": torch.ones(2, 2)}, file)
    elif damage == "twice":
        save_file({**weights, "module." + EMBEDDING: weights[EMBEDDING].clone()}, file)
    with pytest.raises(InputError) as refusal:
        PretrainedWeights(tmp_path).require(parameter_shapes(ModernBertConfig(**SHAPE)), HEAD)
    assert refusal.value.code == code
