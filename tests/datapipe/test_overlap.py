"""Near-duplicates between held-out and training text are counted, whatever finds or leaves them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import datapipe.overlap
import datapipe.prepare
from configs.schema import Reading
from datapipe.inputs import find_files
from datapipe.manifest import read_manifest
from datapipe.prepare import prepare
from datapipe.selection import HELD_OUT, Selection, is_held_out
from datapipe.text import read_texts
from datapipe.tokenizer import Tokenizer
from launcher.cli import app
from tests.datapipe.test_prepare import digests


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """100 notes of 80 words, each by two patients, with four words replaced; two notes without a patient."""
    rng, rows = np.random.default_rng(0), []
    for number in range(100):
        words = [f"w{word}" for word in rng.integers(0, 5000, 80)]
        other = [f"x{rng.integers(5000)}" if place % 20 == 3 else word for place, word in enumerate(words)]
        rows += [{"text": " ".join(text), "patient": f"{number}-{name}"} for name, text in (("a", words), ("b", other))]
    rows += [{"text": f"a note of {name}", "patient": None} for name in ("no one", "nobody")]
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def counts(notes: Path, tokenizer: Tokenizer, output: Path, processes: int = 1, **selection: Any) -> dict[str, int]:
    """Counts of the training text."""
    patterns = notes.with_name("patterns.txt")
    patterns.write_text(r"\bx\d+")
    said: list[str] = []
    prepare(
        [str(notes)],
        tokenizer,
        output,
        reading=Reading(group="patient", identifiers=str(patterns)),
        selection=Selection(held_out=0.3, **selection),
        report=said.append,
        processes=processes,
    )
    assert any(line.startswith("no patient: ") and "2 documents" in line for line in said)
    assert "compared" not in read_manifest(output / HELD_OUT).sources["notes.jsonl"]
    return read_manifest(output).sources["notes.jsonl"]


def test_near_duplicates_of_held_out_documents(notes: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = counts(notes, tokenizer, tmp_path / "out")
    texts = read_texts(find_files(str(notes))[0], Reading(group="patient"))
    sides = {text.group: is_held_out(text, 0.3) for text in texts}
    pairs = sum(sides[f"{number}-a"] != sides[f"{number}-b"] for number in range(100))
    assert 20 < pairs == found["near held-out"] and found["compared"] == found["documents"]
    assert counts(notes, tokenizer, tmp_path / "near", near_dedup=0.8)["near held-out"] == 0


def test_a_large_text_is_sampled(
    notes: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample goes by content, so it is the same at any number of processes."""
    monkeypatch.setattr(datapipe.overlap, "TRAINING_DOCUMENTS", 40)
    monkeypatch.setattr(datapipe.overlap, "HELD_OUT_DOCUMENTS", 10)
    found = counts(notes, tokenizer, tmp_path / "out")
    assert 20 < found["compared"] < 70 and found["near held-out"] < 10
    assert found["spans"] > 100
    monkeypatch.setattr(datapipe.prepare, "SMALL", 1000)
    assert counts(notes, tokenizer, tmp_path / "again", processes=2) == found
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


def test_the_summary_says_it(notes: Path, tmp_path: Path) -> None:
    options = ["--tokenizer", "package://tokenizer/modernbert", "--output", str(tmp_path / "out"), "--held-out", "0.3"]
    prepared = CliRunner().invoke(app, ["prepare", str(notes), *options, "--processes", "1"])
    assert prepared.exit_code == 0, prepared.output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).output
    for output in (prepared.output, shown):
        assert "training documents compared are near-duplicates of held-out ones" in output
        assert "[CLS] ... [SEP]" in output and "B on disk" in output
    assert "--group COLUMN" in prepared.output and "held out" in shown
