"""No token of an identifier is ever a label, whatever the file, the objective, the backend and the interruptions."""

from __future__ import annotations

import csv
import json
import random
import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import datapipe.shard_writer
from configs.errors import InputError
from configs.schema import Data, Reading, Source
from datapipe.batch import IGNORE, PackedSequence, label_bytes
from datapipe.identifiers import Identifier, find_identifiers, load_patterns, merge_overlapping, with_placeholders
from datapipe.inputs import find_inputs
from datapipe.loader import Loader, check_sources, evaluation_batches
from datapipe.manifest import read_manifest
from datapipe.notes import Notes
from datapipe.paths import local_path
from datapipe.prepare import ensure_prepared, prepare
from datapipe.records import Text
from datapipe.selection import HELD_OUT, Block, Selection
from datapipe.shard_report import inspect_shards
from datapipe.shard_writer import ShardWriter
from datapipe.shards import ShardReader
from datapipe.tar_members import DamagedError
from datapipe.targets import Masked, Mixed, NextToken, Targets
from datapipe.text import read_texts
from datapipe.tokenizer import Tokenizer, load_tokenizer
from datapipe.words import word_starts
from launcher.cli import app
from tests.datapipe.conftest import refused, write_shards
from tests.datapipe.tars import TAR_END, tar_member
from tests.toy_tokenizers import byte_level, sentencepiece_like

DIGITS = re.compile(rb"[0-9]")
WORDS = ["the", "patient", "was", "given", "aspirin;", "fièvre,", "José", "하", "😀", "and", "(then)", "sent", "home\n"]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def note(rng: random.Random, words: int) -> dict[str, Any]:
    """A text whose digits stand in identifiers only, and the spans of these."""
    text, spans = "", []
    for _ in range(words):
        if rng.random() < 0.25:
            start = len(text)
            text += rng.choice(["Smith-{}", "{}", "dr {}", "{}th May {}"]).replace("{}", str(rng.randrange(10**6)))
            spans.append([start, len(text), "NAME"])
        else:
            text += rng.choice(WORDS)
        text += rng.choice([" ", "", "  ", "\n"])
    return {"text": text, "spans": spans}


def objectives(tokenizer: Tokenizer) -> dict[str, Targets | Mixed]:
    masked = Masked(0.6, (0.5, 0.4, 0.1), 7, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)
    by_word = replace(masked, starts_word=word_starts(tokenizer))
    mixed = Mixed((NextToken(), by_word), (0.5, 0.5), 7)
    return {"clm": NextToken(), "mlm": masked, "words": by_word, "mixture": mixed}


def data_of(*shards: Path, **more: Any) -> Data:
    sources = [{"name": path.name, "shards": str(path)} for path in shards]
    return Data(sequence_length=64, streams=2, sources=sources, **more)


def pieces(tokenizer: Tokenizer, ids: np.ndarray) -> list[bytes]:
    return [tokenizer.token_bytes[int(token_id)] for token_id in ids if int(token_id) not in tokenizer.special_ids]


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32), stop=st.integers(1, 7))
def test_no_label_is_of_an_identifier(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, seed: int, stop: int
) -> None:
    """Two sources, documents longer than a row, resumed at any step; everything but the identifiers is a label."""
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("notes")
    for name in ("a", "b"):
        notes = [note(rng, rng.choice([1, 5, 60])) for _ in range(12)]
        prepare([str(write_jsonl(folder / f"{name}.jsonl", notes))], tokenizer, folder / name, processes=1)
    data = data_of(folder / "a", folder / "b")
    for name, targets in objectives(tokenizer).items():
        steps = list(Loader(data, 4, tokenizer, 0, 1).steps(targets, 2, 0, 8, None))
        for batch in (micro for step in steps for micro in step.micro_batches):
            labels = pieces(tokenizer, batch.labels[batch.labels != IGNORE])
            assert labels and not any(map(DIGITS.search, labels))
            if batch.objective == "clm":
                assert any(map(DIGITS.search, pieces(tokenizer, batch.inputs)))
                unmarked = [piece for piece in pieces(tokenizer, batch.inputs) if not DIGITS.search(piece)]
                assert len(labels) > 0.5 * len(unmarked)  # Smith, dr, May and the first tokens are not among them
        resumed = Loader(data, 4, tokenizer, 0, 1).steps(targets, 2, stop, 8, steps[stop - 1].state)
        for one, other in zip(steps[stop:], resumed, strict=True):
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                np.testing.assert_array_equal(a.inputs, b.inputs, err_msg=name)
                np.testing.assert_array_equal(a.labels, b.labels, err_msg=name)


def test_dali_marks_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    notes = [note(random.Random(n), 40) for n in range(30)]
    prepare([str(write_jsonl(tmp_path / "a.jsonl", notes))], tokenizer, tmp_path / "a", processes=1)
    for targets in objectives(tokenizer).values():
        ours, theirs = (
            Loader(data_of(tmp_path / "a", backend=backend), 4, tokenizer, 0, 1).steps(targets, 2, 0, 12, None)
            for backend in ("numpy", "dali")
        )
        for one, other in zip(ours, theirs, strict=True):
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                np.testing.assert_array_equal(a.inputs, b.inputs)
                np.testing.assert_array_equal(a.labels, b.labels)


def test_labels_and_inputs_of_a_marked_row(tokenizer: Tokenizer) -> None:
    """Every token that is neither marked nor special is a label at rate 1, and a marked one stays as it is."""
    ids = np.array([tokenizer.cls_id, *range(1000, 1010), tokenizer.sep_id, tokenizer.pad_id], np.int32)
    marked = np.zeros(13, bool)
    marked[[1, 4, 5, 10]] = True
    row = PackedSequence(ids, (12,), 0, 0, (), marked)
    _, labels = NextToken()([row])
    expected = np.array([*ids[1:12], IGNORE, IGNORE])
    expected[[0, 3, 4, 9]] = IGNORE
    np.testing.assert_array_equal(labels[0], expected)
    every = Masked(1.0, (0.5, 0.5, 0.0), 7, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)
    for targets in (every, replace(every, starts_word=word_starts(tokenizer))):
        inputs, labels = targets([row])
        np.testing.assert_array_equal(labels[0][marked], IGNORE)
        np.testing.assert_array_equal(inputs[0][marked], ids[marked])
        np.testing.assert_array_equal(labels[0][1:11][~marked[1:11]], ids[1:11][~marked[1:11]])


def test_the_gradient_does_not_know_who_it_was(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The output row of a name gets no pull towards the name, and the labels do not depend on which name stands there.

    With a label the gradient of a row's bias has a term -1; without one it is the sum of the predicted shares, which
    any other absent token gets too.
    """
    names = ("Anna", "Marie")
    ids = [int(token_id) for ids in tokenizer.encode([f" {name}" for name in names]) for token_id in ids]
    assert len(ids) == len(names)
    for name in names:
        text = f"The patient {name} was given aspirin, and {name} went home."
        spans = [[match.start(), match.end(), "NAME"] for match in re.finditer(name, text)]
        prepare(
            [str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text, "spans": spans}]))],
            tokenizer,
            tmp_path / name,
            processes=1,
        )
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(tokenizer.vocab_size, 8, generator=generator)
    for targets in (objectives(tokenizer)["clm"], objectives(tokenizer)["mlm"]):
        batches = []
        for name in names:
            (step,) = Loader(data_of(tmp_path / name), 2, tokenizer, 0, 1).steps(targets, 2, 0, 1, None)
            batches += step.micro_batches
        one, other = batches
        np.testing.assert_array_equal(one.labels, other.labels)
        assert set(one.inputs[one.inputs != other.inputs].tolist()) == {ids[0]}
        for batch in batches:
            weight, bias = embedding.flip(0) / 100, torch.zeros(len(embedding))
            hidden = embedding[torch.as_tensor(batch.inputs)].cumsum(0)  # a token sees those before it
            logits = torch.nn.functional.linear(hidden, weight.requires_grad_(), bias.requires_grad_())
            labels = torch.as_tensor(batch.labels)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            assert weight.grad is not None and bias.grad is not None
            positions = labels != IGNORE
            shares = logits.softmax(-1)[positions].detach()
            for name_id in ids:
                torch.testing.assert_close(bias.grad[name_id], shares[:, name_id].sum())
                torch.testing.assert_close(weight.grad[name_id], shares[:, name_id] @ hidden[positions])
                assert bias.grad[name_id] > 0
            assert all(bias.grad[label] < 0 for label in set(labels[positions].tolist()))


@pytest.mark.parametrize("kind", ["modernbert", "byte-level", "sentencepiece-like"])
@settings(max_examples=25)
@given(data=st.data())
def test_a_token_that_overlaps_is_marked(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, kind: str, data: st.DataObject
) -> None:
    """Any character does, also one that the normalizer joins to another; the ids are those of `encode`."""
    if kind != "modernbert":
        maker = byte_level if kind == "byte-level" else sentencepiece_like
        tokenizer = load_tokenizer(str(maker(tmp_path_factory.mktemp("tokenizer"))))
    text = data.draw(st.text("ab é\u0301\u1112\u1161😀\n1", min_size=1, max_size=30))
    spans = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6))
    given_spans = [Identifier(s, min(s + n, len(text)), "A") for s, n in data.draw(st.lists(spans, max_size=4))]
    ((ids, marked),) = tokenizer.encode_marked([text], [merge_overlapping(given_spans)])
    np.testing.assert_array_equal(ids, tokenizer.encode([text])[0])
    if marked is None:
        assert not given_spans
        return
    covered = {place for start, end, _ in given_spans for place in range(start, end)}
    (encoding,) = tokenizer.backend.encode_batch([text], add_special_tokens=False)
    beside = {place for place in range(len(text)) if not any(s <= place < e for s, e in encoding.offsets)}
    for (start, end), is_marked in zip(encoding.offsets, marked, strict=True):
        assert is_marked or not covered & set(range(start, end))
        if is_marked and not beside:
            assert covered & set(range(start, end))
    if len(ids):
        assert marked.any()


def test_a_long_text_is_marked_in_parts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "A name 123 and some more words. " * 300
    spans = merge_overlapping(Identifier(*match.span(), "ID") for match in re.finditer("123", text))
    ((whole, expected),) = tokenizer.encode_marked([text], [spans])
    monkeypatch.setattr("datapipe.tokenizer.LONGEST_TEXT", 1000)
    (_, (parts, marked)) = tokenizer.encode_marked(["short", text], [(), spans])
    np.testing.assert_array_equal(parts, whole)
    assert expected is not None and marked is not None and expected.sum() == 300
    np.testing.assert_array_equal(marked, expected)


# Shards

marked_documents = st.lists(st.lists(st.tuples(st.integers(0, 2**16 - 1), st.booleans()), max_size=20), min_size=1)


def written(path: Path, documents: Sequence[Sequence[tuple[int, bool]]]) -> None:
    writer = ShardWriter(path)
    for document in documents:
        ids, marked = np.array([i for i, _ in document], np.uint16), np.array([m for _, m in document], bool)
        writer.add(ids, {"source": "a"}, marked if marked.any() else None)
    writer.close()


def reader(path: Path) -> ShardReader:
    return ShardReader(path.open("rb", buffering=0), str(path))


@settings(max_examples=20)
@given(documents=marked_documents)
def test_marks_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[tuple[int, bool]]]
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datapipe.shard_writer, "SAMPLE_DOCUMENTS", 3)
        written(folder / "a.tar", documents)
        (folder / "plain").mkdir()
        written(folder / "plain" / "a.tar", [[(i, False) for i, _ in document] for document in documents])
    if not any(marked for document in documents for _, marked in document):
        assert (folder / "a.tar").read_bytes() == (folder / "plain" / "a.tar").read_bytes()
    one = reader(folder / "a.tar")
    for number, document in enumerate(documents):
        ids, marked = one.document(number)
        assert ids.tolist() == [i for i, _ in document]
        assert (marked.tolist() if marked is not None else [False] * len(ids)) == [m for _, m in document]
    samples = webdataset.WebDataset(str(folder / "a.tar"), shardshuffle=False, empty_check=False).decode()
    marks = [
        np.unpackbits(sample["marked.npy"], count=len(sample["ids.npy"])).tolist()
        if "marked.npy" in sample
        else [0] * len(sample["ids.npy"])
        for sample in samples
    ]
    assert list(chain(*marks)) == [int(marked) for document in documents for _, marked in document]


def test_no_flipped_byte_loses_a_mark(tmp_path: Path) -> None:
    documents = [[(n, n % 3 == 0) for n in range(size)] for size in (9, 0, 21)]
    written(tmp_path / "a.tar", documents)
    content = (tmp_path / "a.tar").read_bytes()
    for place in range(0, len(content), 5):
        (tmp_path / "b.tar").write_bytes(bytes([*content[:place], content[place] ^ 0x55, *content[place + 1 :]]))
        try:
            one = reader(tmp_path / "b.tar")
            for number, document in enumerate(documents):
                ids, marked = one.document(number)
                assert list(zip(ids.tolist(), [] if marked is None else marked.tolist(), strict=True)) == document
        except (InputError, DamagedError):
            continue


def test_a_block_knows_its_identifiers() -> None:
    """So that a preparation that continues makes the shards again whose spans were changed."""
    text = Text("1", b"Anna went home", 0)
    marked = text._replace(identifiers=(Identifier(0, 4, "NAME"),))
    assert len({Block("a", [("a", one)], 0).digest for one in (text, marked)}) == 2


# Files


@pytest.mark.parametrize(
    "spans",
    [
        [[0, 99]],
        [[3, 2]],
        [[2, 2]],
        [[-1, 2]],
        [["0", 2]],
        [[0.0, 2]],
        [[True, 2]],
        [[0, 2, 7]],
        [[0]],
        [0, 2],
        {"start": 0, "end": 2},
        [{"start": 0}],
        "[[0, 2",
        7,
    ],
)
def test_a_bad_span_is_named(tokenizer: Tokenizer, tmp_path: Path, spans: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "Anna", "spans": spans}])
    with refused("spans-invalid", f"{path}, line 2: `spans`: "):
        prepare([str(path)], tokenizer, tmp_path / "out", processes=1)
    reading = Reading(on_error="skip")
    manifest = prepare([str(path)], tokenizer, tmp_path / "skipped", reading=reading, processes=1)
    assert manifest.sources["a.jsonl"]["faulty"] == 1 and manifest.documents == 1


def identifiers(path: Path, **reading: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """Per document its text, and the words and labels of its identifiers."""
    found = find_inputs([str(path)], Reading(**reading), Notes())
    texts = [text for file in found for text in read_texts(file, Reading(**reading))]
    decoded = [(text.text.decode(), text.identifiers) for text in texts]
    return [(text, [(text[one.start : one.end], one.label) for one in places]) for text, places in decoded]


def test_spans_of_every_format_and_tool(tmp_path: Path) -> None:
    text = "Jose\u0301 😀 Anna"
    expected = [(text, [("Jose\u0301", "ID"), ("Anna", "NAME")])]
    forms: list[Any] = [
        [[8, 12, "NAME"], [0, 5]],
        [{"start": 8, "end": 12, "label": "NAME", "token_start": 3}, {"start": 0, "end": 5}],
        [{"start": 8, "end": 12, "entity_type": "NAME", "score": 0.9}, {"start": 0, "end": 5, "label": None}],
        json.dumps([[0, 5], [8, 12, "NAME"]]),
    ]
    for number, spans in enumerate(forms):
        path = write_jsonl(tmp_path / f"{number}.jsonl", [{"note": text, "phi": {"spans": spans}}])
        assert identifiers(path, text="note", spans="phi.spans") == expected
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "spans"], [text, forms[-1]], ["plain", ""]])
    assert identifiers(tmp_path / "a.csv") == [*expected, ("plain", [])]
    rows = [{"text": text, "spans": [{"start": 0, "end": 5, "label": None}, {"start": 8, "end": 12, "label": "NAME"}]}]
    table = pyarrow.Table.from_pylist([*rows, {"text": "x", "spans": None}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert identifiers(tmp_path / "a.parquet") == [*expected, ("x", [])]
    assert identifiers(tmp_path / "a.parquet", spans="none") == [(text, []), ("x", [])]
    (tmp_path / "b.csv").write_text("text\nplain\n")
    assert identifiers(tmp_path / "b.csv") == [("plain", [])]
    with refused("text-missing", "`phi`"):
        identifiers(tmp_path / "b.csv", spans="phi")


def test_brat(tmp_path: Path) -> None:
    text = "Patient Anna\r\nSmith, \u00e9t\u00e9 1923\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_text("no identifiers")
    lines = ["T1\tNAME 8 12;14 19\tAnna Smith", "T2\tDATE 25 29\t1923", "R1\tof Arg1:T1 Arg2:T2", "#1\tNote T1\tx", ""]
    (tmp_path / "a.ann").write_text("\n".join(lines))
    notes = Notes()
    assert len(find_inputs([str(tmp_path)], Reading(), notes)) == 2 and not any(
        ".ann" in line for line in notes.lines()
    )
    found = [("Anna", "NAME"), ("Smith", "NAME"), ("1923", "DATE")]
    assert identifiers(tmp_path) == [(text, found), ("no identifiers", [])]
    assert identifiers(tmp_path / "a.txt", spans="none") == [(text, [])]
    lines[0], lines[1] = "T1\tNAME 8 12;13 18\tAnna Smith", "T2\tDATE 24 28\t1923"  # a line break counts once
    (tmp_path / "a.ann").write_text("\n".join(lines))
    assert identifiers(tmp_path / "a.txt") == [(text, found)]
    with refused("spans-invalid", "a.txt"):
        identifiers(tmp_path, lines=True)
    for line in ("T1\tNAME 7 11\tAnna", "T1\tNAME 8 99\tAnna", "T1\tNAME 8\tAnna", "T1 NAME 8 12 Anna", "T1"):
        (tmp_path / "a.ann").write_text(f"T1\tNAME 8 12\tAnna\n{line}\n")
        with refused("spans-invalid", "a.txt: line 2 of its .ann file"):
            identifiers(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.txt", "a.txt")
        archive.write(tmp_path / "a.ann", "a.ann")
    with refused("spans-in-archive", "a.zip!a.ann"):
        identifiers(tmp_path / "a.zip")
    assert identifiers(tmp_path / "a.zip", spans="none") == [(text, [])]


def test_patterns(tmp_path: Path) -> None:
    path = tmp_path / "phi.txt"
    path.write_text("# dates\nDATE\t\\d{2}\\.\\d{2}\\.\\d{4}\n\n(?<=MRN )\\d+\r\nNAME\t(?i)\\bdr \\w+\n")
    text = "MRN 123, Dr Anna on 01.02.2003 and 4"
    found = merge_overlapping(find_identifiers(load_patterns(str(path)), text))
    assert [(text[one.start : one.end], one.label) for one in found] == [
        ("123", "ID"),
        ("Dr Anna", "NAME"),
        ("01.02.2003", "DATE"),
    ]
    masked, places = with_placeholders(text, found)
    assert masked == "MRN [ID], [NAME] on [DATE] and 4"
    assert [masked[one.start : one.end] for one in places] == ["[ID]", "[NAME]", "[DATE]"]
    for content, line in (
        ("ok\n(", 2),
        ("\\d*", 1),
        ("a b\tc", 1),
        ("NAME\t", 1),
        ("x\nMRN  \\d+", 2),
        ("A\tb\nMRN \\d+", 2),
    ):
        path.write_text(content)
        with refused("pattern-invalid", f"phi.txt, line {line}: ", "--identifiers"):
            load_patterns(str(path))
    for content, code in ((b"# nothing\n", "pattern-invalid"), (b"\xff", "not-readable")):
        path.write_bytes(content)
        with refused(code, "phi.txt", "--identifiers"):
            load_patterns(str(path))
    with refused("not-readable", "none.txt", "--identifiers"):
        load_patterns(str(tmp_path / "none.txt"))


def test_masked_texts_are_what_the_other_options_see(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Notes that differ in the name only are duplicates then; columns of --where are read as they are."""
    words = "was seen today and sent home with aspirin in the evening"
    rows = [{"text": f"{name} {words} {n % 5}", "keep": n < 20} for n in range(30) for name in ("Anna", "Bert")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "phi.txt").write_text("NAME\tAnna|Bert\n")
    reading = Reading(where="keep", identifiers=str(tmp_path / "phi.txt"))
    options: dict[str, Any] = {"processes": 1, "selection": Selection(dedup=True, held_out=0.4)}
    marked = prepare([str(path)], tokenizer, tmp_path / "marked", reading=reading, **options)
    assert marked.sources["a.jsonl"]["duplicates"] == 30
    masked = reading.model_copy(update={"mask_spans": True})
    for near, name in ((None, "masked"), (0.8, "near")):
        options["selection"] = Selection(dedup=True, held_out=0.4, near_dedup=near)
        manifest = prepare([str(path)], tokenizer, tmp_path / name, reading=masked, **options)
        counts = manifest.sources["a.jsonl"]
        held = read_manifest(tmp_path / name / HELD_OUT).sources["a.jsonl"] if name == "masked" else {}
        assert counts["duplicates"] == 35 and counts["filtered"] == 20
        if near is None:
            assert counts["spans"] + held["spans"] == 5
            assert counts["marked"] + held["marked"] == 5 * len(tokenizer.encode(["[NAME]"])[0])
        else:
            assert counts["near-duplicates"] == 4
    report = str(inspect_shards(tmp_path / "masked"))
    assert "identifiers" in report and "marked tokens" in report and "[NAME]" not in report.split("000000.tar[")[1]


def test_evaluation_counts_no_identifier(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Bits per byte are of the bytes of the labels: with those of the marked tokens they are the whole text."""
    notes = [{**row, "text": row["text"] + "."} for row in (note(random.Random(n), 20) for n in range(9))]
    prepare([str(write_jsonl(tmp_path / "a.jsonl", notes))], tokenizer, tmp_path / "a", processes=1)
    data = data_of(tmp_path / "a", evaluation={"shards": str(tmp_path / "a"), "sequences": 1000})
    batches = evaluation_batches(data.model_copy(update={"sequence_length": 512}), NextToken(), 1, tokenizer, 0, 1)
    counted = sum(label_bytes(batch.labels, tokenizer.byte_lengths) for batch in batches)
    spans = [[Identifier(*span) for span in row["spans"]] for row in notes]
    encoded = tokenizer.encode_marked([row["text"] for row in notes], spans)
    assert counted == sum(
        int(tokenizer.byte_lengths[ids if marked is None else ids[~marked]].sum()) for ids, marked in encoded
    )
    assert 0 < counted < sum(len(row["text"].encode()) for row in notes)


def test_raw_text_with_identifiers_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It is tokenized as it is read, without marks."""
    member = tar_member("0.json", json.dumps({"text": "Anna", "spans": [[0, 4]]}).encode())
    (tmp_path / "0.tar").write_bytes(member + TAR_END)
    with refused("spans-in-raw-text"):
        list(Loader(data_of(tmp_path), 2, tokenizer, 0, 1).steps(NextToken(), 1, 0, 1, None))
    (tmp_path / "0.tar").write_bytes(tar_member("0.txt", b"Anna") + tar_member("0.ann", b"") + TAR_END)
    with refused("spans-in-raw-text"):
        reader(tmp_path / "0.tar")


def test_a_recipe_that_asks_for_identifiers_gets_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Shards that were prepared with others are refused, because nothing else would tell."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "Anna went home"}] * 3)
    (tmp_path / "phi.txt").write_text("Anna")
    plain = Source(name="a", text=str(path), shards=str(tmp_path / "out"))
    asking = plain.model_copy(update={"reading": Reading(identifiers=str(tmp_path / "phi.txt"))})
    ensure_prepared(Data(sources=(asking,)), tokenizer)
    ensure_prepared(Data(sources=(asking,)), tokenizer)
    assert read_manifest(tmp_path / "out").sources["a.jsonl"]["spans"] == 3
    globbed = asking.model_copy(update={"text": (), "shards": f"{tmp_path}/out/*.tar"})
    ensure_prepared(Data(sources=(globbed,)), tokenizer)
    (tmp_path / "phi.txt").write_text("Bert")
    with refused("other-identifiers", key="data.sources.reading"):
        ensure_prepared(Data(sources=(asking,)), tokenizer)
    ensure_prepared(Data(sources=(plain,)), tokenizer)
    said: list[str] = []
    other = asking.model_copy(update={"shards": str(tmp_path / "other")})
    ensure_prepared(Data(sources=(other,)), tokenizer, None, said.append)
    assert any("no identifier was found" in line for line in said)
    (tmp_path / "phi.txt").unlink()
    with refused("not-readable", "phi.txt"):
        ensure_prepared(Data(sources=(asking,)), tokenizer)


def test_the_command_counts_identifiers(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "Anna went home", "phi": [[0, 4, "NAME"]]}, {"text": "x", "phi": []}]
    )
    options = ["--tokenizer", "package://tokenizer/modernbert", "--output", str(tmp_path / "out"), "--spans", "phi"]
    result = CliRunner().invoke(app, ["prepare", str(path), *options])
    assert result.exit_code == 0, result.output
    assert "1 identifiers, 1 marked tokens" in " ".join(result.output.split())
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).output
    assert "1 identifiers, 1 marked tokens" in shown and "Anna" not in shown
    assert local_path(str(tmp_path / "out")).is_dir()


def test_offsets_of_another_unit_are_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """JavaScript counts the emoji as two, and the span would miss the name by one character."""
    text = "Zo\u00e9 \U0001f600 called Kim today"
    rows = [{"text": text, "spans": [{"start": 13, "end": 16, "label": "N", "text": "Kim"}]}]
    assert text[13:16] == "Kim"
    assert next(read_texts(write_jsonl(tmp_path / "a.jsonl", rows))).identifiers
    rows[0]["spans"][0].update(start=14, end=17)
    with refused("spans-invalid", "line 1"):
        list(read_texts(write_jsonl(tmp_path / "b.jsonl", rows)))


def test_data_without_any_label_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"Kim Lee {number}", "spans": [[0, len(f"Kim Lee {number}"), "N"]]} for number in range(9)]
    prepare([str(write_jsonl(tmp_path / "a.jsonl", rows))], tokenizer, tmp_path / "a", processes=1)
    with refused("no-label", "every token is marked"):
        check_sources(data_of(tmp_path / "a"), tokenizer, tokenizer.vocab_size)


def test_an_evaluation_set_without_any_label_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards(tmp_path / "a", [[[5], [6]]], tokenizer)
    data = data_of(tmp_path / "a", evaluation={"shards": str(tmp_path / "a"), "sequences": 4})
    masked = Masked(1e-9, (0.8, 0.1, 0.1), 0, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)
    with refused("no-label", "mlm", key="data.evaluation"):
        evaluation_batches(data, masked, 1, tokenizer, 0, 1)
