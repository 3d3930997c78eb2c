"""Every format of a task file gives the examples of its twin in plain BIO, and so the same score."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from configs.errors import InputError
from studies.examples import Splits, read_splits
from studies.scores import score
from studies.tasks import Files, Task

Write = Callable[[str, str], Path]
SENTENCES = [
    ("Severe asthma , treated .", ["O", "B-Disease", "O", "O", "O"]),
    ("Give insulin glargine today", ["O", "B-Drug", "I-Drug", "O"]),
    ("No fever", ["O", "B-Disease"]),
]
GUESS = [["O", "B-Disease", "O", "O", "O"], ["O", "B-Drug", "O", "O"], ["O", "I-Disease"]]


def conll(rows: list[tuple[str, list[str]]], separator: str = "\t") -> str:
    return "\n\n".join(
        "\n".join(f"{word}{separator}{tag}" for word, tag in zip(text.split(), tags, strict=True))
        for text, tags in rows
    )


def spans(tags: list[str], text: str) -> list[tuple[int, int, str]]:
    """Turn BIO tags into spans, independently of the product."""
    places, at = [], 0
    for word in text.split():
        places.append((at, at + len(word)))
        at += len(word) + 1
    found: list[tuple[int, int, str]] = []
    for (start, end), tag in zip(places, tags, strict=True):
        if tag.startswith("B"):
            found.append((start, end, tag[2:]))
        elif tag.startswith("I"):
            found[-1] = (found[-1][0], end, tag[2:])
    return found


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def retagged(**letters: str) -> list[tuple[str, list[str]]]:
    """Write the tags in another scheme: the letter for a first, an inner, a last and an only word."""
    result = []
    for text, tags in SENTENCES:
        new = []
        for index, tag in enumerate(tags):
            last = index + 1 == len(tags) or not tags[index + 1].startswith("I")
            kind = "O" if tag == "O" else {"B": "only" if last else "first", "I": "last" if last else "inner"}[tag[0]]
            new.append(tag if tag == "O" else letters[kind] + tag[1:])
        result.append((text, new))
    return result


def brat(write: Write) -> str:
    for number, (text, tags) in enumerate(SENTENCES):
        write(f"brat/{number}.txt", text + "\n")
        lines = [f"T{i}\t{t} {s} {e}\t{text[s:e]}" for i, (s, e, t) in enumerate(spans(tags, text), 1)]
        write(f"brat/{number}.ann", "\n".join([*lines, "R1\tTreats Arg1:T1 Arg2:T1"]) + "\n")
    return "brat"


def arrow(write: Write, ids: bool, folder: bool) -> str:
    names = ["O", "B-Disease", "I-Disease", "B-Drug", "I-Drug"]
    tags = [[names.index(tag) for tag in tags] if ids else tags for _, tags in SENTENCES]
    table = pa.table({"tokens": [text.split() for text, _ in SENTENCES], "ner_tags": tags})
    feature = {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}
    info = {"features": {"ner_tags": feature}} if ids else {}
    path = write("ds/state.json", json.dumps({"_data_files": [{"filename": "data-0.arrow"}]})).parent
    if folder:
        (path / "dataset_info.json").write_text(json.dumps(info))
        with pa.OSFile(str(path / "data-0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        return "ds"
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": info})}), path / "t.parquet")
    return "ds/*.parquet"


def of_spans(form: Callable[[str, list[tuple[int, int, str]]], dict[str, Any]]) -> Callable[[Write], str]:
    rows = [form(text, spans(tags, text)) for text, tags in SENTENCES]
    return lambda write: write("s.jsonl", jsonl(rows)).name


def studio(text: str, found: list[tuple[int, int, str]]) -> dict[str, Any]:
    values = [{"start": s, "end": e, "text": text[s:e], "labels": [t]} for s, e, t in found]
    result = [{"type": "labels", "value": value} for value in values]
    return {"data": {"text": text}, "annotations": [{"result": [], "was_cancelled": True}, {"result": result}]}


def prodigy(text: str, found: list[tuple[int, int, str]]) -> dict[str, Any]:
    at, tokens = 0, []
    for word in text.split():
        tokens.append({"text": word, "start": at, "end": at + len(word)})
        at += len(word) + 1
    named = [{"start": s, "end": e, "label": t} for s, e, t in found]
    return {"text": text, "tokens": tokens, "spans": named, "answer": "accept"}


def gz(write: Write) -> str:
    path = write("a.tsv", "")
    path.with_name("a.tsv.gz").write_bytes(gzip.compress(conll(SENTENCES).encode()))
    return "a.tsv.gz"


FORMATS: dict[str, Callable[[Write], str]] = {
    "spaces, BOM, CRLF, comments": lambda w: (
        w("a.txt", "\ufeff-DOCSTART- O\n\n# sent_id = 1\n" + conll(SENTENCES, " x ").replace("\n", "\r\n")).name
    ),
    "header and trailing tab": lambda w: w("a.tsv", "token\tlabel\n" + conll(SENTENCES).replace("\n", "\t\n")).name,
    "IOB1": lambda w: w("a.tsv", conll(retagged(first="I", inner="I", last="I", only="I"))).name,
    "BIOES": lambda w: w("a.tsv", conll(retagged(first="B", inner="I", last="E", only="S"))).name,
    "BILOU": lambda w: w("a.tsv", conll(retagged(first="B", inner="I", last="L", only="U"))).name,
    "underscores": lambda w: (
        w("a.tsv", conll([(t, [g.replace("-", "_") for g in tags]) for t, tags in SENTENCES])).name
    ),
    "gz": gz,
    "brat": brat,
    "tokens and tags": lambda w: w("a.jsonl", jsonl([{"tokens": t.split(), "tags": g} for t, g in SENTENCES])).name,
    "json": lambda w: (
        w("a.json", json.dumps({"data": [{"words": t.split(), "ner_tags": g} for t, g in SENTENCES]})).name
    ),
    "doccano": of_spans(lambda text, found: {"text": text, "label": [list(span) for span in found]}),
    "doccano with relations": of_spans(
        lambda text, found: {
            "text": text,
            "entities": [{"id": 1, "start_offset": s, "end_offset": e, "label": t} for s, e, t in found],
        }
    ),
    "prodigy": of_spans(prodigy),
    "label studio": of_spans(studio),
    "label studio, minimal": of_spans(
        lambda text, found: {"text": text, "label": [{"start": s, "end": e, "labels": [t]} for s, e, t in found]}
    ),
    "parquet with ids": lambda w: arrow(w, ids=True, folder=False),
    "dataset folder with ids": lambda w: arrow(w, ids=True, folder=True),
    "dataset folder with names": lambda w: arrow(w, ids=False, folder=True),
}


def task(train: str, **changes: Any) -> Task:
    files = Files(train=train, validation=train, test=None)
    return Task(**{"name": "t", "kind": "tokens", "score": "entity_f1", "files": files, **changes})


def read(write: Write, name: str, **changes: Any) -> Splits:
    return read_splits(task(name, **changes), write("plain.tsv", conll(SENTENCES)).parent)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_and_its_twin_in_plain_bio(write: Write, name: str) -> None:
    plain, other = read(write, "plain.tsv"), read(write, FORMATS[name](write))

    def contents(splits: Splits) -> list[tuple[Any, ...]]:
        return [(example.text, example.words, example.labels) for example in splits.train]

    assert contents(other) == contents(plain)
    assert (other.labels, other.scored) == (plain.labels, plain.scored)
    scores = [score("entity_f1", [e.labels for e in s.test], GUESS, s.scored) for s in (plain, other)]
    assert scores[0] == scores[1] == pytest.approx(0.4)


def test_bare_types_are_read_if_they_are_named(write: Write) -> None:
    rows = [(text, [tag[2:] or "O" for tag in tags]) for text, tags in SENTENCES]
    write("io.tsv", conll(rows))
    with pytest.raises(InputError) as error:
        read(write, "io.tsv")
    assert error.value.code == "bad-tag"
    named = read(write, "io.tsv", types=("Disease", "Drug"))
    assert [example.labels for example in named.train] == [tuple(tags) for _, tags in SENTENCES]
    one = read(write, "plain.tsv", types=("Drug",))
    assert one.labels == ("B-Drug", "I-Drug", "O")
    assert "2 words of other types" in one.notes[0]


def test_what_bio_cannot_state_is_counted(write: Write) -> None:
    text = "pain in arm and leg\nofsevere asthma"
    write("b/1.txt", text)
    lines = ["Sign 0 11\tpain in arm", "Place 8 11\tarm", "Sign 0 4;16 19\tpain leg", "Sign 22 35\tsevere asthma"]
    write("b/1.ann", "".join(f"T{i}\t{line}\n" for i, line in enumerate(lines)))
    splits = read(write, "b")
    assert [example.labels for example in splits.train] == [
        ("B-Sign", "I-Sign", "I-Sign", "O", "O"),
        ("B-Sign", "I-Sign"),
    ]
    told = " ".join(splits.notes)
    assert all(word in told for word in ("1 discontinuous", "1 nested", "1 entities that end inside a word"))


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.tsv", "fever\tNN\n", "bad-tag"),
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": [1]}\n', "tags-without-names"),
        ("a.jsonl", '{"text": "a b", "label": [[0, 9, "X"]]}\n', "bad-span"),
        ("a.jsonl", '{"text": "a b", "label": [[0, 1, ""]]}\n', "bad-span"),
        ("a.jsonl", '{"text": "a b", "spans": [{"start": 0, "end": 1, "text": "b", "label": "X"}]}\n', "bad-span"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}\n', "missing-field"),
        ("a.jsonl", '{"text": "a b"}\n', "missing-field"),
        ("a.json", "[1]", "bad-json"),
        ("b/1.ann", "T1\tX 0 3\tab c\n", "file-missing"),
    ],
)
def test_what_is_no_entity_is_refused(write: Write, name: str, content: str, code: str) -> None:
    write(name, content)
    with pytest.raises(InputError) as error:
        read(write, name.partition("/")[0])
    assert error.value.code == code


def texts(write: Write, name: str, content: str, **changes: Any) -> list[tuple[str, tuple[str, ...]]]:
    write(name, content)
    changes = {"kind": "single", "score": "accuracy", "columns": {"text": "text", "label": "label"}, **changes}
    return [(example.text, example.labels) for example in read(write, name, **changes).train]


TWO = [('a, "b"\nc', ("yes",)), ("d", ("no",))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"a, ""b""\nc",yes\nd,no\n'),
        ("a.csv", '\ufefftext;label\r\n"a, ""b""\nc";yes\r\nd;no\r\n'),
        ("a.tsv", 'id\ttext\tlabel\n1\t"a, ""b""\nc"\tyes\n2\td\tno\n'),
        ("a.json", json.dumps({"1": {"text": TWO[0][0], "label": "yes"}, "2": {"text": "d", "label": ["no"]}})),
    ],
)
def test_tables_of_texts(write: Write, name: str, content: str) -> None:
    assert texts(write, name, content) == TWO


def test_stray_quotes_and_long_fields(write: Write) -> None:
    assert texts(write, "a.tsv", 'text\tlabel\n"Quote\t1\nAn" end\t0\n') == [('"Quote', ("1",)), ('An" end', ("0",))]
    (long, _), _ = texts(write, "a.csv", f'text,label\n"{"x" * 200_000}",1\ny,0\n')
    assert len(long) == 200_000
    with pytest.raises(InputError) as error:
        texts(write, "a.csv", 'text,label\n"a"b,1\n')
    assert error.value.code == "bad-csv"


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("3.2", "single"),
        ("null", "single"),
        ('""', "single"),
        ('["a", "b"]', "single"),
        ('[[0, 5, "X"]]', "multi"),
        ('"[0 1]"', "multi"),
        ('"high"', "regression"),
        ("NaN", "regression"),
    ],
)
def test_nothing_that_is_no_label_becomes_a_class(write: Write, label: str, kind: str) -> None:
    metric = {"single": "accuracy", "multi": "micro_f1", "regression": "spearman"}[kind]
    with pytest.raises(InputError) as error:
        texts(write, "a.jsonl", f'{{"text": "a", "label": {label}}}\n', kind=kind, score=metric)
    assert error.value.code == "bad-label"


def test_names_of_ids_and_numbers(write: Write) -> None:
    lines = '{"text": "a", "label": 1}\n{"text": "b", "label": 0.0}\n'
    assert [label for _, label in texts(write, "a.jsonl", lines, names=("no", "yes"))] == [("yes",), ("no",)]
    numbers = texts(write, "a.jsonl", lines, kind="regression", score="spearman")
    assert [label for _, label in numbers] == [("1.0",), ("0.0",)]


def test_labels_that_training_lacks_are_misses(write: Write) -> None:
    write("test.tsv", "Rash\tB-Symptom\nfever\tB-Disease\n")
    splits = read_splits(
        task("plain.tsv", files=Files(train="plain.tsv", validation="plain.tsv", test="test.tsv")),
        write("plain.tsv", conll(SENTENCES)).parent,
    )
    assert any("Symptom (1)" in note for note in splits.notes)
    assert score("entity_f1", [splits.test[0].labels], [["O", "B-Disease"]], splits.scored) == pytest.approx(2 / 3)
    assert "B-Symptom" not in splits.labels
