"""Merging: the coefficients of a decay, a planted quadratic, and a run's checkpoints as a model of their own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM

from configs.errors import InputError
from configs.load import dump_config
from configs.schema import Model
from datapipe.tokenizer import load_tokenizer
from engine.checkpoint import latest_of_run, step_directory
from engine.export import export_hf
from engine.initial_weights import check_initial_weights
from engine.merge import MergeWeights, Origin, coefficients, merge, merged_weights
from engine.modernbert.config import resolve_architecture
from launcher.export import export_model
from tests.engine.world import stored, toy_config
from tests.toy_recipe import TOKENIZER

SHAPE = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
DECAYS: dict[MergeWeights, Callable[[float], float]] = {"mean": lambda x: 1 - x, "1-sqrt": lambda x: 1 - math.sqrt(x)}


@settings(max_examples=30)
@given(count=st.integers(1, 200), weights=st.sampled_from(["mean", "1-sqrt"]))
def test_the_coefficients_are_those_of_the_decay(count: int, weights: MergeWeights) -> None:
    """Checkpoint i and all after it together weigh as much as the stretch before i would have been trained."""
    found = coefficients(count, weights)
    assert sum(found) == pytest.approx(1) and min(found) > 0
    for i in range(count):
        assert sum(found[i:]) == pytest.approx(DECAYS[weights](i / count))
    if weights == "mean":
        assert found == pytest.approx([1 / count] * count)


@pytest.mark.parametrize("weights", DECAYS)
def test_a_planted_quadratic(weights: MergeWeights) -> None:
    """The merge of SGD's iterates is the iterate whose gradients are scaled by the decay, and has less noise."""
    architecture = ModernBertConfig(vocab_size=128, pad_token_id=0, **SHAPE)
    tokenizer = load_tokenizer(TOKENIZER)
    generator = torch.Generator().manual_seed(0)
    rate, count = 0.5, 20
    name = "model.embeddings.tok_embeddings.weight"
    values = torch.full((128, 8), 3.0, dtype=torch.float64)
    for _ in range(50):  # loss = values**2 / 2, with noise of variance 1 in the gradient
        values = values - rate * (values + torch.randn(values.shape, generator=generator, dtype=torch.float64))
    iterates, gradients = [values], []
    for _ in range(count - 1):
        gradients.append(iterates[-1] + torch.randn(values.shape, generator=generator, dtype=torch.float64))
        iterates.append(iterates[-1] - rate * gradients[-1])

    def origin(number: int) -> Origin:
        whole = ModernBertForMaskedLM(architecture).state_dict() | {name: iterates[number].float()}
        return Origin(str(number), architecture, tokenizer, True, whole.__getitem__)

    found = merged_weights([origin(i) for i in range(count)], coefficients(count, weights))[name].double()
    decayed = iterates[0] - rate * sum(DECAYS[weights](i / count) * g for i, g in enumerate(gradients, start=1))
    torch.testing.assert_close(found, decayed, rtol=0, atol=1e-6)
    losses = [float((x**2).mean() / 2) for x in (iterates[-1], found)]
    assert losses[1] < 0.4 * losses[0]


@pytest.fixture(scope="module")
def run(alone_run: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy run with its configuration, as the launcher writes it."""
    directory = tmp_path_factory.mktemp("run") / "toy"
    shutil.copytree(alone_run, directory)
    (directory / "config.yaml").write_text(dump_config(toy_config(shards)))
    return directory


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge of the toy run's two checkpoints."""
    output = tmp_path_factory.mktemp("merged") / "out"
    shares, notes = merge([str(run)], output, steps=2, weights="1-sqrt")
    assert len(notes) == 1 and "phases" in notes[0]
    assert [Path(name).name for name, _ in shares] == ["step-00000003", "step-00000005"]
    return output


def test_a_run_becomes_a_model(merged: Path, run: Path) -> None:
    model, report = AutoModelForMaskedLM.from_pretrained(merged / "hf", output_loading_info=True)
    assert not report["missing_keys"] and AutoTokenizer.from_pretrained(merged / "hf").mask_token == "[MASK]"
    old, new = (stored(run, step)["optimizer.state.param.lm_head.dense.weight"] for step in (3, 5))
    expected = math.sqrt(0.5) * old.double() + (1 - math.sqrt(0.5)) * new.double()
    torch.testing.assert_close(model.state_dict()["head.dense.weight"], expected.float(), rtol=0, atol=1e-7)
    card = (merged / "hf" / "README.md").read_text()
    assert "step-00000003 | 0.707107" in card and "step-00000005 | 0.292893" in card


def test_the_runs_own_tokenizer_is_taken(run: Path, tmp_path: Path) -> None:
    """The directory that the recipe names may have changed since."""
    own = tmp_path / "run"
    shutil.copytree(run, own)
    load_tokenizer(TOKENIZER).save(own / "tokenizer")
    for path in (own / "checkpoints").glob("step-*/detour.json"):
        meta = json.loads(path.read_text())
        meta["config"]["tokenizer"] = str(tmp_path / "gone")
        path.write_text(json.dumps(meta))
    merge([str(own)], tmp_path / "out", steps=2)
    assert load_tokenizer(str(tmp_path / "out" / "hf")).vocab_size == load_tokenizer(TOKENIZER).vocab_size


def test_a_deleted_last_checkpoint_is_told(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own)
    shutil.rmtree(own / "checkpoints" / "step-00000005")
    assert latest_of_run(own).name == "step-00000003", "the run is not at its end"
    (own / "hf").mkdir()
    with pytest.raises(InputError) as refusal:
        export_model(own, tmp_path / "out")
    assert refusal.value.code == "checkpoint-thinned"


def test_the_checkpoint_and_the_model_are_the_same(merged: Path, shards: Path, tmp_path: Path) -> None:
    """The checkpoint is one for `model.init`, and its export is the model beside it."""
    tokenizer = load_tokenizer(toy_config(shards).tokenizer)
    architecture = resolve_architecture(Model(init=str(merged / "checkpoint")), tokenizer)
    assert check_initial_weights(str(merged / "checkpoint"), architecture, tokenizer) == []
    export_hf(merged / "checkpoint", tmp_path / "hf", tokenizer)
    first, second = (folder / "hf" / "model.safetensors" for folder in (merged, tmp_path))
    assert first.read_bytes() == second.read_bytes()


def test_different_kinds_of_models_are_averaged(merged: Path, run: Path, tmp_path: Path) -> None:
    """A run, a checkpoint of it, a Hugging Face model and a checkpoint without an optimizer."""
    checkpoint = step_directory(run / "checkpoints", 3)
    merge([str(path) for path in (run, checkpoint, merged / "hf", merged / "checkpoint")], tmp_path / "out")
    name = "model.layers.1.mlp.Wo.weight"
    ours = "decoder.layers.1.mlp.linear_fc2.weight"
    old, new = (stored(run, step)[f"optimizer.state.param.{ours}"] for step in (3, 5))
    twice = load_file(merged / "hf" / "model.safetensors")[name]
    found = load_file(tmp_path / "out" / "hf" / "model.safetensors")[name]
    torch.testing.assert_close(found, (old + new + 2 * twice) / 4, rtol=0, atol=1e-6)


def spoiled(merged: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(merged / "hf", folder)
    change(folder)
    return folder


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def another_tokenizer(folder: Path) -> None:
    """Exchange the ids of two tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġpatients"], vocabulary["Ġdisease"] = vocabulary["Ġdisease"], vocabulary["Ġpatients"]
    path.write_text(json.dumps(content))


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "not finite": (
        lambda folder: edit_weights(folder, lambda w: w["head.dense.weight"].view(-1)[:1].fill_(torch.nan)),
        "weights-not-finite",
    ),
    "a shape": (
        lambda folder: edit_weights(folder, lambda w: w.update({"head.dense.weight": torch.zeros(4, 4)})),
        "weights-shape",
    ),
    "no head": (lambda folder: edit_weights(folder, lambda w: w.pop("head.dense.weight")), "weights-missing"),
    "another window": (lambda folder: edit_config(folder, local_attention=64), "models-differ"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer-unusable"),
    "another tokenizer": (another_tokenizer, "tokenizers-differ"),
}


@pytest.mark.parametrize("case", CASES)
def test_models_that_do_not_fit_are_refused(case: str, merged: Path, tmp_path: Path) -> None:
    change, code = CASES[case]
    bad = spoiled(merged, tmp_path / "bad", change)
    with pytest.raises(InputError) as refusal:
        merge([str(merged / "hf"), str(bad)], tmp_path / "out")
    assert refusal.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    ("options", "key", "code"),
    [
        ({"steps": 3}, "--steps", "too-few-checkpoints"),
        ({}, "--steps", "one-model"),
        ({"weights": "1-sqrt"}, "--weights", "weights-without-steps"),
    ],
)
def test_what_one_run_cannot_give(options: dict[str, Any], key: str, code: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        merge([str(run)], tmp_path / "out", **options)
    assert (refusal.value.key, refusal.value.code) == (key, code)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_kept(merged: Path, run: Path) -> None:
    before = sorted(merged.rglob("*"))
    with pytest.raises(InputError) as refusal:
        merge([str(run)], merged, steps=2)
    assert refusal.value.code == "output-not-empty" and sorted(merged.rglob("*")) == before
    with pytest.raises(InputError) as refusal:
        merge([str(merged / "hf")], merged.parent / "other", steps=2)
    assert refusal.value.code == "not-one-run"
