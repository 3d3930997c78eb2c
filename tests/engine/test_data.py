"""Runs whose data ends or is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.schema import RunConfig
from datapipe.prepare import ensure_prepared
from datapipe.tokenizer import load_tokenizer
from engine.checkpoint import latest_valid, step_of
from monitoring.log import read_events, read_metrics
from monitoring.telemetry import Telemetry
from tests.datapipe.conftest import write_shards
from tests.engine.world import run_world, toy_config, train
from tests.toy_recipe import TOKENIZER


def configured(folder: Path, steps: int, **source: object) -> RunConfig:
    """Configure a run over 300 documents of 11 to 40 tokens."""
    (folder / "run").mkdir()
    texts = [f"document {number} " + "word " * (8 + number % 30) for number in range(300)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = [{"name": "a", "text": str(folder / "a.jsonl"), "shards": str(folder / "a"), **source}]
    data = {"sources": sources, "on_error": "skip"}
    config = toy_config(folder, data=data, phases=[{"objective": "clm", "steps": steps}])
    ensure_prepared(config.data, load_tokenizer(config.tokenizer))
    return config


def test_what_was_trained_before_the_data_ended_is_saved(tmp_path: Path) -> None:
    """Streams end at different steps; all ranks save when the first one ends."""
    config = configured(tmp_path, 500, epochs=2)
    with pytest.raises(AssertionError, match=r"all have reached their `epochs` at step \d+"):
        run_world(2, train, config, tmp_path / "run")
    newest, damaged = latest_valid(tmp_path / "run" / "checkpoints")
    assert newest is not None and not damaged
    assert 2 <= step_of(newest) == read_metrics(tmp_path / "run")[-1]["step"] < 500


def test_skipped_documents_are_events_once_each(tmp_path: Path) -> None:
    """Shards of format 1 have a sample per document, so damage costs single documents."""
    (tmp_path / "run").mkdir()
    documents = [[number + 10] * (8 + number % 30) for number in range(300)]
    shards = write_shards(tmp_path / "a", [documents], load_tokenizer(TOKENIZER))
    data = {"sources": [{"name": "a", "shards": str(shards)}], "on_error": "skip"}
    config = toy_config(tmp_path, data=data, phases=[{"objective": "clm", "steps": 6}])
    path = shards / "000000.tar"
    path.write_bytes(path.read_bytes().replace(b"<u2", b"<f2", 40))
    run_world(1, train, config, tmp_path / "run", 3)
    first = sum(event["documents"] for event in skipped(tmp_path / "run"))
    run_world(1, train, config, tmp_path / "run")
    now = Telemetry.read(tmp_path / "run")
    assert now is not None
    assert 0 < first <= sum(event["documents"] for event in skipped(tmp_path / "run")) == now.counters.drawn["a"][2]


def skipped(directory: Path) -> list[dict]:
    return [event for event in read_events(directory) if event["event"] == "documents_skipped"]
