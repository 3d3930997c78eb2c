from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from configs.errors import InputError
from studies.probe import probe
from studies.retention import retention
from studies.tasks import load_task
from studies.transplant import parse_layers, transplant
from tests.studies.conftest import save_model
from tests.studies.test_evaluate import classification, ner, quick

Write = Callable[[str, str], Path]


def test_probes_read_every_layer(model: Path, write: Write, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=1)
    summary = probe([str(model), str(other)], quick(ner(write)), tmp_path / "out", say=lambda line: None)
    assert [(row["model"], row["layer"]) for row in summary["layers"]] == [
        (str(path), layer) for path in (model, other) for layer in range(3)
    ]
    assert all(row["score"] > 0.8 for row in summary["layers"]), "words of a template are told apart by any state"
    for row in summary["layers"][3:]:
        assert row["low"] <= row["difference"] <= row["high"]
    assert json.loads((tmp_path / "out" / "probe.json").read_text()) == summary
    again = probe([str(model)], quick(ner(write)), tmp_path / "again", say=lambda line: None)
    assert again["layers"] == summary["layers"][:3], "no noise"


@pytest.mark.parametrize(
    ("kind", "metric", "best"),
    [("single", "macro_f1", 0.8), ("multi", "micro_f1", 0.8), ("regression", "spearman", 0.5)],
)
def test_probes_of_texts(model: Path, write: Write, tmp_path: Path, kind: str, metric: str, best: float) -> None:
    task = classification(
        write, "multi" if kind == "multi" else "single", "macro_f1" if kind == "single" else "micro_f1"
    )
    if kind == "regression":
        tree = yaml.safe_load(Path(task).read_text())
        Path(task).write_text(yaml.safe_dump({**tree, "kind": kind, "score": metric}))
        for path in tmp_path.glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps({**row, "label": len(row["label"])}) + "\n" for row in rows))
    summary = probe([str(model)], quick(task), tmp_path / "out", say=lambda line: None)
    assert max(row["score"] for row in summary["layers"]) > best


def test_probes_of_one_label_and_of_empty_texts(model: Path, write: Write, tmp_path: Path) -> None:
    """The tokenizer frames nothing, so an empty text has no token."""
    folder = save_model(tmp_path / "unframed")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    rows = [{"text": "fever" * (number % 2), "label": ["ill"] * (number % 2)} for number in range(40)]
    for count, name in enumerate(("train", "validation", "test")):
        write(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows[2 * count :]))
    tree = {"name": "one", "kind": "multi", "score": "micro_f1", "columns": {"text": "text", "label": "label"}}
    files = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    task = write("one.yaml", yaml.safe_dump({**tree, "files": files, "protocol": {"preset": "english"}}))
    summary = probe([str(folder)], quick(str(task)), tmp_path / "out", say=lambda line: None)
    assert [row["score"] for row in summary["layers"]] == [1, 1, 1]


def retention_task(write: Write) -> str:
    lines = [json.dumps({"text": f"The patient number {n} has fever and cough."}) for n in range(12)]
    write("general.jsonl", "\n".join(lines))
    tree = {"name": "keep", "kind": "masked", "score": "masked_accuracy", "files": {"test": "general.jsonl"}}
    return str(write("keep.yaml", yaml.safe_dump({**tree, "protocol": {"preset": "english", "batch": 4}})))


def test_retention_is_measured_on_the_same_tokens(model: Path, write: Write, tmp_path: Path) -> None:
    task, protocol, folder = load_task(retention_task(write), {})
    worse = AutoModelForMaskedLM.from_pretrained(model)
    with torch.no_grad():
        for name, weight in worse.named_parameters():
            if "layers.2" in name:
                weight.mul_(-3)
    worse.save_pretrained(tmp_path / "worse")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "worse" / name).write_bytes((model / name).read_bytes())
    summary = retention([str(model), str(tmp_path / "worse"), str(model)], task, protocol, folder, tmp_path / "out")
    first, changed, same = summary["models"]
    assert (same["difference"], same["ratio"]) == ([0, 0, 0], [1, 1, 1])
    assert changed["ratio"][0] == pytest.approx(changed["perplexity"] / first["perplexity"])
    assert math.isclose(math.log(first["perplexity"]), math.log(2_048), rel_tol=0.05), "an untrained model guesses"
    assert summary["masked_tokens"] > 12
    with pytest.raises(InputError) as error:
        probe([str(model)], quick(retention_task(write), epochs=1), tmp_path / "p")
    assert error.value.code == "masked-task"


def test_retention_of_models_that_differ_in_files_and_length(model: Path, write: Write, tmp_path: Path) -> None:
    """A tokenizer that was saved again is the same; the shorter model decides the windows of both."""
    task, protocol, folder = load_task(retention_task(write), {})
    short = save_model(tmp_path / "short", max_position_embeddings=8)
    content = json.loads((short / "tokenizer.json").read_text())
    (short / "tokenizer.json").write_text(json.dumps(content, indent=4))
    alone, both = (
        retention([str(path) for path in paths], task, protocol, folder, tmp_path / "out")
        for paths in ([short], [model, short])
    )
    assert alone["masked_tokens"] == both["masked_tokens"]
    assert both["models"][0]["perplexity"] == both["models"][1]["perplexity"], "of the same tokens"


def test_documents_without_a_masked_token_take_no_part(model: Path, write: Write, tmp_path: Path) -> None:
    """Resamples of them alone would have no accuracy, and the interval no ends."""
    reference = retention_task(write)
    task, protocol, folder = load_task(reference, {})
    texts = ["a", "", "b", *(f"The patient number {n} has fever and cough. " * 3 for n in range(3))]
    write("general.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    summary = retention([str(model), str(model)], task, protocol, folder, tmp_path / "out")
    assert summary["documents"] == 3
    assert summary["models"][1]["ratio"] == [1, 1, 1]
    write("general.jsonl", "\n".join(json.dumps({"text": text}) for text in texts[:3]))
    with pytest.raises(InputError) as error:
        retention([str(model)], task, protocol, folder, tmp_path / "out")
    assert error.value.code == "too-little-text"


def test_few_long_documents_are_read_in_windows(model: Path, write: Write, tmp_path: Path) -> None:
    """Two books would else be two first pages."""
    reference = retention_task(write)
    write("general.jsonl", "\n".join(json.dumps({"text": f"The patient {n} has fever. " * 60}) for n in range(2)))
    masked = []
    for count in (2, 8):
        task, protocol, folder = load_task(reference, {"length": 32})
        masked.append(retention([str(model)], task, protocol, folder, tmp_path, count)["masked_tokens"])
    assert 3 * masked[0] < masked[1] < 5 * masked[0], "a window each, then four"


def test_transplanted_layers_are_the_others(model: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=1)
    assert transplant(str(model), str(other), parse_layers("0,2"), tmp_path / "both") == 11
    a, b, both = (load_file(folder / "model.safetensors") for folder in (model, other, tmp_path / "both"))
    for name, weight in both.items():
        source = b if ".layers.0." in name or ".layers.2." in name else a
        assert torch.equal(weight, source[name])
    AutoModelForMaskedLM.from_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("layers", "code"), [("0-3", None), ("2-1", None), ("x", None)])
def test_layers_that_are_not_there(model: Path, tmp_path: Path, layers: str, code: str | None) -> None:
    with pytest.raises(InputError) as error:
        transplant(str(model), str(model), parse_layers(layers), tmp_path / "out")
    assert error.value.key == "--layers"
    assert not (tmp_path / "out").exists()


def test_other_shapes_are_refused(model: Path, tmp_path: Path) -> None:
    wider = save_model(tmp_path / "wider", hidden_size=64)
    with pytest.raises(InputError) as error:
        transplant(str(model), str(wider), (0,), tmp_path / "out")
    assert error.value.code == "different-shapes"


@pytest.mark.parametrize("key", ["local_attention", "num_attention_heads", "norm_eps"])
def test_layers_that_would_compute_something_else_are_refused(model: Path, tmp_path: Path, key: str) -> None:
    other = save_model(tmp_path / "other", seed=1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, key: 2 * config[key]}))
    with pytest.raises(InputError, match=key) as error:
        transplant(str(model), str(other), (0,), tmp_path / "out")
    assert error.value.code == "models-differ"
    assert not (tmp_path / "out").exists()
