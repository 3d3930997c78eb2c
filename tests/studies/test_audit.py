"""`detour audit`: ranks against brute force, and a model that memorised a canary against its controls."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ModernBertConfig, ModernBertDecoderForCausalLM, ModernBertForMaskedLM

from configs.errors import InputError
from configs.files import write_atomically
from configs.load import dump_config, validate
from configs.schema import Reading, RunConfig
from datapipe.canaries import Canaries, canaries_of_sources, draw
from datapipe.prepare import prepare
from datapipe.tokenizer import Tokenizer, load_tokenizer
from engine.checkpoint import step_directory
from engine.checkpoint_meta import CheckpointMeta
from engine.export import export_hf
from engine.megatron import cpu
from engine.model_card import refresh_card
from engine.modernbert.config import build_config, read_config
from engine.parallel import single_process
from monitoring.report import write_report
from monitoring.run_directory import RunDirectory
from studies.audit import audit
from studies.exposure import chance, encode, exposures, score
from tests.datapipe.conftest import refused
from tests.toy_recipe import toy_recipe
from tests.toy_tokenizers import byte_level, sentencepiece_like

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_exposure_is_the_rank_by_brute_force(scores: list[float], others: list[float]) -> None:
    for value, found in zip(scores, exposures(np.array(scores), np.array(others)), strict=True):
        places = [place for place, one in enumerate(sorted([*others, value], reverse=True), 1) if one == value]
        assert found == pytest.approx(math.log2(len(others) + 1) - math.log2(sum(places) / len(places)))


def test_chance_is_the_mean_over_all_ranks() -> None:
    mean, deviation = chance(1023)
    exposed = exposures(np.arange(1024) - 0.5, np.arange(1023.0))
    assert (mean, deviation) == pytest.approx((exposed.mean(), exposed.std()))
    assert chance(10**6)[0] == pytest.approx(1 / math.log(2), abs=1e-4)


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like])
def test_secrets_are_found_in_every_tokenizer(kind: object, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(kind(tmp_path / "tokenizer")))  # type: ignore[operator]
    canaries = draw("seed", 20)
    for canary, encoded in zip(canaries, encode(canaries, tokenizer), strict=True):
        (trained,) = tokenizer.encode([canary.text])
        assert encoded.ids == (*tokenizer.prefix_ids, *trained, *tokenizer.suffix_ids)
        text = tokenizer.backend.decode([encoded.ids[place] for place in encoded.secret])
        assert text.strip() == canary.secret


def test_a_tokenizer_without_digits_is_refused(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    digit = {"Regex": "[0-9]"}
    content["normalizer"] = {"type": "Replace", "pattern": digit, "content": "0"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with refused("secrets-not-told-apart", key="tokenizer"):
        encode(draw("seed", 20), load_tokenizer(str(folder)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(byte_level(tmp_path_factory.mktemp("tokenizer") / "bytes")))


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    text = "".join(json.dumps({"text": f"Note {number} of a patient."}) + "\n" for number in range(40))
    (folder / "notes.jsonl").write_text(text)
    prepare([str(folder / "notes.jsonl")], tokenizer, folder / "shards", reading=Reading(canaries=24))
    return folder / "shards"


def recipe(shards: Path, tokenizer: Tokenizer, *changes: dict) -> dict:
    return toy_recipe([{"name": "notes", "shards": str(shards)}], {"tokenizer": str(tokenizer.directory)}, *changes)


@pytest.fixture(scope="module")
def known(shards: Path, tokenizer: Tokenizer) -> Canaries:
    return canaries_of_sources(validate(RunConfig, recipe(shards, tokenizer), "recipe").data)["notes"]


@pytest.fixture(scope="module")
def untrained(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "cls", "sep", "bos", "eos")}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "untrained"
    ModernBertForMaskedLM(ModernBertConfig(vocab_size=tokenizer.vocab_size, **ids, **shape)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def memorised(untrained: Path, known: Canaries, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked model that was trained on the canaries with 64 copies and on nothing else."""
    model = ModernBertForMaskedLM.from_pretrained(untrained).train()
    encoded = encode([one for one in known.planted if one.copies == 64], tokenizer)
    rows = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(one.ids) for one in encoded], batch_first=True, padding_value=tokenizer.pad_id
    )
    is_secret = torch.zeros_like(rows, dtype=torch.bool)
    for row, one in enumerate(encoded):
        is_secret[row, list(one.secret)] = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for step in range(200):
        masked = is_secret & (torch.rand(rows.shape) < (0.3 if step % 2 else 1.0))
        labels = rows.masked_fill(~masked, -100)
        inputs = rows.masked_fill(masked, tokenizer.mask_id)
        loss = model(inputs, attention_mask=rows != tokenizer.pad_id, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("model") / "memorised"
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def make_run(directory: Path, tree: dict, model: Path, steps: list[int]) -> Path:
    """A run directory whose checkpoints all hold the model."""
    cpu.install()
    from engine.checkpoint.writer import save_now
    from engine.modernbert.convert import huggingface_weights, load_weights
    from engine.modernbert.model import ModernBert, transformer_config

    directory.mkdir()
    config = validate(RunConfig, tree, "recipe")
    write_atomically(RunDirectory(directory).config, dump_config(config))
    architecture = build_config(read_config(str(model)), str(model))
    with single_process():
        ours = ModernBert(transformer_config(architecture), architecture)
        load_weights(ours, huggingface_weights(str(model), architecture, 1))
        for step in steps:
            meta = CheckpointMeta(
                step=step,
                architecture=architecture.to_dict(),
                optimizer=False,
                files={},
                config=config.model_dump(mode="json", exclude_none=True),
                phase=0,
                data={str(stream): {"sources": {"notes": {"documents": 137}}} for stream in range(4)},
                recorder={},
                guards={},
            )
            save_now(step_directory(RunDirectory(directory).checkpoints, step), ours, None, meta)
    return directory


@pytest.mark.parametrize("attack", ["clm", "mlm"])
def test_scores_are_the_log_likelihoods_of_the_secrets(
    attack: str, shards: Path, untrained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", recipe(shards, tokenizer), untrained, [9])
    kind = "decoder" if attack == "clm" else "encoder"
    export_hf(step_directory(run / "checkpoints", 9), tmp_path / "hf", tokenizer, kind=kind)
    encoded = encode(draw("seed", 70), tokenizer)
    scores = score(tmp_path / "hf", attack, encoded, tokenizer)  # type: ignore[arg-type]
    one = encoded[66]
    if attack == "clm":
        causal = ModernBertDecoderForCausalLM.from_pretrained(tmp_path / "hf")
        logits = causal(torch.tensor([one.ids])).logits[0].log_softmax(-1)
        expected = sum(float(logits[place - 1, one.ids[place]]) for place in one.secret)
    else:
        model = ModernBertForMaskedLM.from_pretrained(tmp_path / "hf")
        expected = 0.0
        for place in one.secret:
            ids = torch.tensor([one.ids])
            ids[0, place] = tokenizer.mask_id
            expected += float(model(ids).logits[0, place].log_softmax(-1)[one.ids[place]])
    assert scores[66] == pytest.approx(expected, rel=1e-4)


def test_what_a_model_memorised_is_told_and_nothing_else(
    shards: Path, known: Canaries, tokenizer: Tokenizer, untrained: Path, memorised: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", recipe(shards, tokenizer), memorised, [4, 6, 9])
    twin_phases = {"phases": [{"objective": "mlm", "steps": 9}]}
    twin = make_run(tmp_path / "twin", recipe(shards, tokenizer, twin_phases), untrained, [9])
    export_hf(step_directory(run / "checkpoints", 9), run / "hf", tokenizer)
    with refused("no-such-checkpoint", "4, 6, 9", key="--checkpoint"):
        audit([run], checkpoint=5, count=255)
    refresh_card(run / "hf", run)
    assert "Memorisation" not in (run / "hf" / "README.md").read_text(), "a card of its own stays as it is"
    shutil.rmtree(run / "hf")
    export_hf(step_directory(run / "checkpoints", 9), run / "hf", tokenizer)
    assert "was not measured" in (run / "hf" / "README.md").read_text()
    assert "was not measured" in write_report(run).read_text()

    result = audit([run, twin], count=255)
    first, other = result["runs"]
    assert first == json.loads((run / "audit.json").read_text())
    assert [(row["step"], row["objective"]) for row in first["rows"]] == [(6, "clm"), (9, "clm"), (9, "mlm")]
    assert [(row["step"], row["objective"]) for row in other["rows"]] == [(9, "mlm")]
    assert first["rows"][0]["passes"] == {"notes": pytest.approx(4 * 137 / known.documents)}
    groups = {group["copies"]: group for group in first["rows"][2]["groups"]}
    assert {copies: group["canaries"] for copies, group in groups.items()} == {0: 24, 1: 6, 4: 6, 16: 6, 64: 6}
    assert first["ceiling_bits"] == 8
    assert groups[64]["mean"] > 6
    assert all(groups[copies]["mean"] < 4.5 for copies in (0, 1, 4, 16))
    assert not first["notes"], "the controls are further from chance than 3.3 standard errors"
    (difference,) = result["differences"]
    assert difference["objective"] == "mlm"
    by_copies = {group["copies"]: group for group in difference["groups"]}
    assert by_copies[64]["high"] < 0 < by_copies[0]["high"]

    card = (run / "hf" / "README.md").read_text()
    assert "was not measured" not in card
    assert "| step 9 (end of MLM) | MLM | " in card
    assert card.count("## Memorisation") == 1
    assert "<td>step 9 (end of MLM)</td>" in RunDirectory(run).report.read_text()

    shutil.rmtree(run / "checkpoints" / "step-00000006")
    damaged = next(file for file in (run / "checkpoints" / "step-00000009").iterdir() if file.suffix == ".distcp")
    damaged.write_bytes(b"short")
    with refused("no-checkpoint", "step-00000009"):
        audit([run], count=255)
    assert json.loads((run / "audit.json").read_text()) == first
    again = audit([run], checkpoint=4, count=255)["runs"][0]
    assert [row["step"] for row in again["rows"]] == [4, 6, 9, 9]


def test_a_run_without_canaries_says_so(untrained: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"text": "one"}\n')
    prepare([str(tmp_path / "notes.jsonl")], tokenizer, tmp_path / "shards")
    run = make_run(tmp_path / "run", recipe(tmp_path / "shards", tokenizer), untrained, [9])
    with refused("no-canaries", key="data.sources"):
        audit([run])
    shutil.rmtree(tmp_path / "shards")
    with refused("no-such-directory", "source notes"):
        audit([run])
    with pytest.raises(InputError) as refusal:
        audit([tmp_path])
    assert refusal.value.code == "not-a-run"
