"""Model directories of the family, made from random weights: in, three steps of both objectives, out.

Each is compared with transformers: the weights and the configuration that go in, and the losses of both objectives
that the exports give in transformers' own classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
    PreTrainedModel,
)

from configs.load import validate
from configs.schema import Phase, RunConfig
from datapipe.batch import IGNORE
from datapipe.loader import evaluation_batches
from datapipe.prepare import prepare
from datapipe.tokenizer import Tokenizer, load_tokenizer
from datapipe.vocabulary import pieces_of_new_tokens
from engine.checkpoint import step_directory
from engine.export import export_hf
from engine.modernbert.config import read_config, resolve_architecture, special_ids
from engine.modernbert.convert import NewTokens, huggingface_weights, parameter_shapes
from engine.modernbert.pretrained import EMBEDDING, QKV, canonical_name
from engine.objectives import CausalLM, MaskedLM
from monitoring.log import read_metrics
from tests.engine.world import run_world, train
from tests.toy_tokenizers import TEXTS, byte_level, extended, sentencepiece_like

Tensors = dict[str, torch.Tensor]
Write = Callable[[Path, Tensors], Path]
STEPS = 3
OLD_STYLE_NAMES = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}


def _safetensors(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def _bin(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def _prefixed(prefix: str) -> Write:
    return lambda folder, tensors: _safetensors(folder, {prefix + name: tensor for name, tensor in tensors.items()})


def _in_parts(stem: str, save: Callable[[Tensors, Path], object]) -> Write:
    def write(folder: Path, tensors: Tensors) -> Path:
        names = sorted(tensors)
        for part in (0, 1):
            save({name: tensors[name] for name in names[part::2]}, folder / f"{part}-{stem}")
        index = {name: f"{number % 2}-{stem}" for number, name in enumerate(names)}
        (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": index}))
        return folder

    return write


def _composer(folder: Path, tensors: Tensors) -> Path:
    """FlexBERT's names in a file of Composer, with its own copy of the tied decoder."""
    flex = {
        "model." + name.replace("model.layers.", "model.encoder.layers.").replace("model.", "bert.", 1): tensor
        for name, tensor in tensors.items()
    }
    flex["model.decoder.weight"] = tensors[EMBEDDING].clone()
    file = folder / "ep0-ba3-rank0.pt"
    torch.save({"state": {"model": flex}, "rng": []}, file)
    return file


def _with_decoder(folder: Path, tensors: Tensors) -> Path:
    return _safetensors(folder, {**tensors, "decoder.weight": tensors[EMBEDDING].clone()})


@dataclass(frozen=True)
class Kind:
    """A kind of model directory."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its configuration."""
    style: str = "new"
    """Style of its config.json: `new` as transformers 5 writes it, `old` as transformers 4, or `both`."""
    model: type[PreTrainedModel] = ModernBertForMaskedLM
    dtype: torch.dtype = torch.float32
    write: Write = _safetensors
    tokenizer: str = "bytes"
    trained_with: str | None = None
    """Tokenizer of the model, if the run's is another."""
    more_rows: int = 0
    """Rows of the vocabulary beyond the tokenizer's."""


THETAS = {"full_attention": {"rope_theta": 640.0}, "sliding_attention": {"rope_theta": 160.0}}
THETAS = {kind: {"rope_type": "default", **rope} for kind, rope in THETAS.items()}
EQUAL_THETAS = {kind: {"rope_type": "default", "rope_theta": 160_000.0} for kind in THETAS}
KINDS: dict[str, Kind] = {
    "ModernBERT, new style": Kind(),
    "ModernBERT, old style": Kind(style="old"),
    "ModernBERT, both styles": Kind(style="both"),
    "changed thetas, new style": Kind({"rope_parameters": THETAS}),
    "changed thetas, old style": Kind({"rope_parameters": THETAS}, style="old"),
    "wide window": Kind({"local_attention": 40}),
    "layer types without a period": Kind({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    "one global layer": Kind({"layer_types": ["full_attention"] + ["sliding_attention"] * 2}, style="old"),
    "global layers only": Kind({"layer_types": ["full_attention"] * 3}),
    "Ettin encoder": Kind({"rope_parameters": EQUAL_THETAS}, style="old"),
    "Ettin decoder": Kind({"rope_parameters": EQUAL_THETAS}, model=ModernBertDecoderForCausalLM),
    "decoder with changed thetas": Kind({"rope_parameters": THETAS}, model=ModernBertDecoderForCausalLM),
    "mmBERT": Kind({"rope_parameters": EQUAL_THETAS}, style="old", tokenizer="pieces"),
    "granite-small": Kind(
        {"classifier_activation": "silu", "rope_parameters": THETAS}, model=ModernBertModel, dtype=torch.bfloat16
    ),
    "relu head": Kind({"classifier_activation": "relu"}),
    "embedding model": Kind(model=ModernBertModel),
    "sequence classifier": Kind(model=ModernBertForSequenceClassification),
    "token classifier, fp16": Kind(model=ModernBertForTokenClassification, dtype=torch.float16),
    "safetensors in parts": Kind(write=_in_parts("model.safetensors", save_file)),
    "pytorch_model.bin": Kind(write=_bin),
    "pytorch_model.bin in parts": Kind(write=_in_parts("pytorch_model.bin", torch.save)),
    "Composer": Kind(write=_composer, style="old"),
    "torch.compile": Kind(write=_prefixed("_orig_mod.")),
    "DDP": Kind(write=_prefixed("module.")),
    "stored tied decoder": Kind(write=_with_decoder),
    "padded vocabulary": Kind(more_rows=9),
    "more tokens": Kind(tokenizer="more bytes", trained_with="bytes"),
    "more tokens in padded rows": Kind(tokenizer="more bytes", trained_with="bytes", more_rows=9),
    "more tokens, mmBERT": Kind(tokenizer="more pieces", trained_with="pieces"),
}


@dataclass(frozen=True)
class Made:
    """A model directory, and what was put into it."""

    config: RunConfig
    run: Path
    architecture: ModernBertConfig
    tensors: Tensors
    """Tensors in fp32, by the names of a ModernBertForMaskedLM."""
    new_tokens: NewTokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """Every kind, made and trained in one process; more threads than one only cost time at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("family")
    folders = {"bytes": byte_level(home / "bytes"), "pieces": sentencepiece_like(home / "pieces")}
    folders |= {f"more {name}": extended(home / f"more {name}", folder) for name, folder in folders.items()}
    (home / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3))
    tokenizers = {name: load_tokenizer(str(folder)) for name, folder in folders.items()}
    for name, tokenizer in tokenizers.items():
        prepare([str(home / "notes.jsonl")], tokenizer, home / "shards" / name)
    made = {
        name: _made(home / str(number), home / "shards", kind, tokenizers)
        for number, (name, kind) in enumerate(KINDS.items())
    }
    run_world(1, _train_all, [(one.config, one.run) for one in made.values()])
    yield made
    torch.set_num_threads(threads)


def _train_all(runs: list[tuple[RunConfig, Path]]) -> None:
    for config, directory in runs:
        directory.mkdir()
        train(config, directory)


def _made(home: Path, shards: Path, kind: Kind, tokenizers: dict[str, Tokenizer]) -> Made:
    own, chosen = tokenizers[kind.trained_with or kind.tokenizer], tokenizers[kind.tokenizer]
    folder = home / "model"
    model = _random_model(kind, own)
    model.config.save_pretrained(folder)
    stored = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "decoder.weight"}
    init = kind.write(folder, stored)
    own.save(folder)
    _restyle(folder / "config.json", kind.style)
    window = model.config.local_attention
    if kind.model is ModernBertDecoderForCausalLM:
        window -= 2  # a decoder's window counts the token itself
    expected = {key: value for key, value in model.config.to_dict().items() if key in ModernBertConfig().to_dict()}
    tree = {
        "name": "toy",
        "model": {"init": str(init)},
        "data": {
            "sequence_length": 64,
            "streams": 2,
            "sources": [{"name": "notes", "shards": str(shards / kind.tokenizer)}],
            "evaluation": {
                "shards": str(shards / kind.tokenizer),
                "every": "1000 steps",
                "sequences": 2,
                "mask_rate": 0.3,
            },
        },
        "batch": {"sequences": 2, "micro": 2},
        "phases": [{"objective": "clm", "steps": STEPS}, {"objective": "mlm", "steps": STEPS, "mask_rate": 0.3}],
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "precision": "fp32",
        "monitoring": {"every": "1 steps"},
    }
    if kind.trained_with:
        tree["tokenizer"] = str(chosen.directory)
    return Made(
        validate(RunConfig, tree, "toy"),
        home / "run",
        ModernBertConfig(**expected | {"local_attention": window}),
        _joined({canonical_name(name): tensor.float() for name, tensor in stored.items()}),
        pieces_of_new_tokens(own, chosen),
    )


def _random_model(kind: Kind, tokenizer: Tokenizer) -> PreTrainedModel:
    """A model whose logits depend strongly on positions: with flat attention a wrong theta would hardly show."""
    torch.manual_seed(7)
    decoder = kind.model is ModernBertDecoderForCausalLM
    shape = {
        "vocab_size": tokenizer.vocab_size + kind.more_rows,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "local_attention": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    config = (ModernBertDecoderConfig if decoder else ModernBertConfig)(
        **shape | special_ids(tokenizer) | dict(kind.fields)
    )
    model = kind.model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif any(part in name for part in ("Wqkv", "q_proj", "k_proj")):
                parameter.mul_(30)
            else:
                parameter.mul_(3)
    return model.to(kind.dtype)


def _restyle(path: Path, style: str) -> None:
    content = json.loads(path.read_text())
    if style in ("old", "both"):
        content |= {old: content["rope_parameters"][kind]["rope_theta"] for kind, old in OLD_STYLE_NAMES.items()}
        kinds = content["layer_types"]
        content["global_attn_every_n_layers"] = (
            (kinds[1:].index("full_attention") + 1) if "full_attention" in kinds[1:] else len(kinds)
        )
    if style == "old":
        del content["rope_parameters"], content["layer_types"]
    path.write_text(json.dumps(content))


def _joined(tensors: Tensors) -> Tensors:
    joined = {name: tensor for name, tensor in tensors.items() if not QKV.fullmatch(name)}
    for name in tensors:
        if (match := QKV.fullmatch(name)) and match[2] == "q":
            parts = [tensors[f"{match[1]}{letter}_proj.weight"] for letter in "qkv"]
            joined[f"{match[1]}Wqkv.weight"] = torch.cat(parts)
    return joined


@pytest.mark.parametrize("name", KINDS)
def test_in(name: str, trained: dict[str, Made]) -> None:
    """The weights and the configuration that a run starts from are those of transformers."""
    made = trained[name]
    init = made.config.model.init
    tokenizer = load_tokenizer(made.config.tokenizer)
    architecture = resolve_architecture(made.config.model, tokenizer)
    for key in ("rope_parameters", "layer_types", "local_attention", "classifier_activation", "hidden_size"):
        assert getattr(architecture, key) == getattr(made.architecture, key), key
    assert architecture.vocab_size == max(made.architecture.vocab_size, tokenizer.vocab_size)
    assert read_config(init)["vocab_size"] == made.architecture.vocab_size
    weights = huggingface_weights(init, architecture, 0, made.new_tokens)
    for key in parameter_shapes(architecture).keys() & made.tensors.keys():
        expected, actual = made.tensors[key], weights(key).float()
        known = (
            [row for row in range(len(expected)) if row not in made.new_tokens]
            if "tok_emb" in key or key == "decoder.bias"
            else slice(None)
        )
        torch.testing.assert_close(actual[known], expected[known], rtol=0, atol=0)
        if "tok_emb" in key or key == "decoder.bias":
            for token_id, pieces in made.new_tokens.items():
                torch.testing.assert_close(actual[token_id], expected[list(pieces)].mean(dim=0))


@pytest.mark.parametrize("name", KINDS)
def test_out(name: str, trained: dict[str, Made], tmp_path: Path) -> None:
    """The exports have, in transformers' classes, the losses of both objectives that the run measured."""
    made = trained[name]
    lines = read_metrics(made.run)
    assert [line["objective"] for line in lines] == ["clm"] * STEPS + ["mlm"] * STEPS
    checkpoint = step_directory(made.run / "checkpoints", 2 * STEPS)
    tokenizer = load_tokenizer(made.config.tokenizer)
    data = made.config.data
    assert data.evaluation is not None
    masked = Phase(objective="mlm", steps=1, mask_rate=data.evaluation.mask_rate)
    for kind, model, objective in (
        ("encoder", ModernBertForMaskedLM, MaskedLM(masked, tokenizer, data.seed)),
        ("decoder", ModernBertDecoderForCausalLM, CausalLM()),
    ):
        export_hf(checkpoint, tmp_path / kind, tokenizer, kind=kind)  # type: ignore[arg-type]
        theirs, report = model.from_pretrained(tmp_path / kind, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        (micro,) = evaluation_batches(data, objective.targets(), 2, tokenizer, 0, 1)
        labels = torch.from_numpy(micro.labels)
        with torch.no_grad():
            logits = [
                theirs.eval()(torch.from_numpy(micro.inputs[None, start:end])).logits[0]
                for start, end in pairwise(map(int, micro.cu_seqlens))
            ]
        loss = torch.nn.functional.cross_entropy(torch.cat(logits), labels, ignore_index=IGNORE)
        assert lines[-1]["eval_loss"][objective.name] == pytest.approx(float(loss), abs=1e-4)
        ids = json.loads((tmp_path / kind / "config.json").read_text())
        assert {key: ids[key] for key in special_ids(tokenizer)} == special_ids(tokenizer)


def test_the_table_is_the_family() -> None:
    assert len(KINDS) >= 25
