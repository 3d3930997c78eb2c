"""Task files as people write them: each is read right, or refused with a message that names the file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml

from configs.errors import InputError
from studies.examples import Splits, read_splits
from studies.tasks import load_task

Write = Callable[[str, str], Path]
COLUMNS = {"text": "text", "label": "label"}


def read(write: Write, kind: str, train: str, test: str, suffix: str, **task: Any) -> Splits:
    score = {"tokens": "entity_f1", "single": "accuracy", "multi": "micro_f1", "regression": "pearson"}[kind]
    write(f"train{suffix}", train)
    write(f"dev{suffix}", train)
    write(f"test{suffix}", test.replace("\nt", "\nq"))  # other texts than those of training
    files = {"train": f"train{suffix}", "validation": f"dev{suffix}", "test": f"test{suffix}"}
    settings = {"name": "t", "kind": kind, "score": score, "files": files, "protocol": {"preset": "english"}, **task}
    if kind != "tokens":
        settings.setdefault("columns", COLUMNS)
    path = write("t.yaml", yaml.safe_dump(settings))
    loaded, _, folder = load_task(str(path), {})
    return read_splits(loaded, folder)


@pytest.mark.parametrize(
    ("lines", "words", "tags"),
    [
        ("# vitamin O\nAspirin\tB-X\nhelps\tO\n", "Aspirin helps", "B-X O"),
        ("# hepatitis B\nAspirin B-X\nhelps O\n", "Aspirin helps", "B-X O"),
        ("#\tO\nAspirin\tB-X\n", "# Aspirin", "O B-X"),
        ("Aspirin\tB-X\t\nhelps\tO \n", "Aspirin helps", "B-X O"),
        ("-DOCSTART- -X- -X- O\r\n\r\nAspirin NN B-NP B-X\r\nhelps V B-VP O\r\n", "Aspirin helps", "B-X O"),
        ("a\tB-X\rb\tO\r\rc\tB-X\r", "a b", "B-X O"),
        ("-DOCSTART- -X- -X- O\n\n#1 B-X\nhelps O\n", "#1 helps", "B-X O"),
        ("#1\tB-X\nhelps\tO\nand\tNN\tO\nis\tO\n", "#1 helps and is", "B-X O O O"),
        ("foo\u00a0bar B-X\nhelps O\n", "foo\u00a0bar helps", "B-X O"),
        ("\u00a0\tO\nAspirin\tB-X\n", "\u00a0 Aspirin", "O B-X"),
        ("a\tE-X\nb\tI-X\nc\tS-X\nd\tI-Y\n", "a b c d", "B-X B-X B-X B-Y"),
    ],
)
def test_columns_as_people_write_them(write: Write, lines: str, words: str, tags: str) -> None:
    splits = read(write, "tokens", lines, "d\tB-X\n", ".tsv")
    assert " ".join(splits.train[0].words) == words
    assert " ".join(splits.train[0].labels) == tags


def test_lines_that_differ_from_the_others_are_told(write: Write) -> None:
    splits = read(write, "tokens", "a\tB-X\n#b\tNN\tO\nc\tNN\tO\nd\tO\n", "d\tB-X\n", ".tsv")
    assert splits.train[0].words == ("a", "c", "d")
    told = "; ".join(splits.notes)
    assert "1 lines that begin with # and end in a tag" in told
    assert "1 lines with another number of columns" in told


def test_another_column_of_tags_is_told(write: Write) -> None:
    splits = read(write, "tokens", "Aspirin NN B-NP B-X\nhelps V B-VP O\n", "d\tB-X\n", ".tsv")
    assert any("another column of tags" in note for note in splits.notes)


def refused(write: Write, *arguments: Any, **task: Any) -> tuple[str | None, str]:
    with pytest.raises(InputError) as error:
        read(write, *arguments, **task)
    return error.value.code, str(error.value)


CONLLU = "1\tAspirin\tNOUN\tB-X\n2\thelps\tVERB\tO\n"


@pytest.mark.parametrize(
    ("train", "test", "code", "file"),
    [
        (CONLLU, "d\tB-X\n", "words-are-numbers", "train.tsv"),
        ("1\ta\tB-X\n1\tb\tO\n", "d\tB-X\n", "words-are-numbers", "train.tsv"),
        ("sentence\tword\ttag\ns1\ta\tB-X\ns1\tb\tO\n", "d\tB-X\n", "word-not-first", "train.tsv"),
        ("a\tB-X|B-Y\nb\tO\n", "d\tB-X\n", "bad-tag", "train.tsv"),
        ("a\tO\nb\tO\n", "d\tB-X\n", "nothing-to-learn", "train.tsv"),
        ("a\tB-X\nb\tO\n", "c\tO\nd\tO\n", "test-without-labels", "test.tsv"),
        ("a\tB-X\nb\tO\n", "c\tB-Z\nd\tO\n", "test-without-labels", "test.tsv"),
        ("a\tB-X\nb\tO\n", "c\nd\n", "bad-token-line", "test.tsv"),
    ],
)
def test_columns_that_say_nothing_are_refused(write: Write, train: str, test: str, code: str, file: str) -> None:
    found, message = refused(write, "tokens", train, test, ".tsv")
    assert found == code
    assert file in message


def table(*rows: str) -> str:
    return "text,label\n" + "".join(f"t{number},{row}\n" for number, row in enumerate(rows))


@pytest.mark.parametrize(
    ("rows", "labels"),
    [(("0.0", "1.0", "0"), ("0", "1")), (("yes ", "no", " yes"), ("no", "yes")), (("01", "1"), ("01", "1"))],
)
def test_labels_that_mean_the_same(write: Write, rows: tuple[str, ...], labels: tuple[str, ...]) -> None:
    assert read(write, "single", table(*rows), table(*labels), ".csv").labels == labels


@pytest.mark.parametrize("written", ["{'no', 'yes'}", "('yes', 'no',)", "['yes', 'no']", "yes|no"])
def test_several_labels_as_python_writes_them(write: Write, written: str) -> None:
    splits = read(write, "multi", table(f'"{written}"', "(yes)"), table("no"), ".csv")
    assert [set(example.labels) for example in splits.train] == [{"yes", "no"}, {"(yes)"}]


@pytest.mark.parametrize("settings", [{"types": ["B-X", "I-X"]}, {"separator": ""}])
def test_settings_that_cannot_be_meant_are_refused(write: Write, settings: dict[str, Any]) -> None:
    _, message = refused(write, "tokens", "a\tB-X\nb\tI-X\n", "d\tB-X\n", ".tsv", **settings)
    assert next(iter(settings)) in message


def test_labels_that_differ_in_case_are_told(write: Write) -> None:
    assert any("case only" in note for note in read(write, "single", table("Yes", "yes"), table("yes"), ".csv").notes)


@pytest.mark.parametrize(
    ("kind", "train", "test", "code", "file"),
    [
        ("single", table("yes", "nan"), table("yes"), "bad-label", "train.csv"),
        ("multi", table("yes", "nan"), table("yes"), "bad-label", "train.csv"),
        ("single", table("yes", "NA"), table("yes"), "bad-label", "train.csv"),
        ("multi", table("yes", "None|no"), table("yes"), "bad-label", "train.csv"),
        ("single", table("250.10", "401"), table("401"), "bad-label", "train.csv"),
        ("single", table("yes", "yes"), table("yes", "no"), "nothing-to-learn", "train.csv"),
        ("single", table("0", "1"), table("-1", "-1"), "test-without-labels", "test.csv"),
        ("single", table("yes", "no"), table("", ""), "bad-label", "test.csv"),
        ("regression", table("1.5", "high"), table("1", "2"), "bad-label", "train.csv"),
        ("regression", table('"3,5"', "2"), table("1", "2"), "bad-label", "decimal comma"),
        ("regression", table("1.5", "2.5"), table("-1", "-1"), "test-without-labels", "test.csv"),
        ("single", "text,label,label\na,x,y\n", table("x"), "column-twice", "train.csv"),
        ("single", "text,label\rt0,x\r\nt1,y\r\n", table("x"), "bad-csv", "train.csv"),
    ],
)
def test_labels_that_are_none_are_refused(write: Write, kind: str, train: str, test: str, code: str, file: str) -> None:
    found, message = refused(write, kind, train, test, ".csv")
    assert found == code
    assert file in message


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize(
    ("rows", "names", "labels"),
    [
        (("250.10", "250.1", "250.0", "250"), ["250", "250.0", "250.1", "250.10"], ("250", "250.0", "250.1", "250.10")),
        (("None", "NA", "x"), ["None", "NA", "x"], ("NA", "None", "x")),
        (("0", "1.0", "1"), ["no", "yes"], ("no", "yes")),
    ],
)
def test_names_say_what_is_a_class(
    write: Write, kind: str, rows: tuple[str, ...], names: list[str], labels: tuple[str, ...]
) -> None:
    assert read(write, kind, table(*rows), table(*rows), ".csv", names=names).labels == labels


def lines(*labels: Any) -> str:
    return "".join(json.dumps({"text": f"t{number}", "label": label}) + "\n" for number, label in enumerate(labels))


@pytest.mark.parametrize(
    ("labels", "task", "expected"),
    [
        (("x|y", " y | z "), {}, [("x", "y"), ("y", "z")]),
        ((["x", "x"], "y|y"), {}, [("x",), ("y",)]),
        (([0, 1, 1], [1, 0, 0]), {"names": ["x", "y", "z"]}, [("y", "z"), ("x",)]),
        (([0, 2], [1]), {"names": ["x", "y", "z"]}, [("x", "z"), ("y",)]),
        (([0, 1], [1, 0], [0, 0], [1, 1]), {"names": ["x", "y"]}, [("y",), ("x",), (), ("x", "y")]),
        (("[0, 1]", "[1, 0]"), {"names": ["x", "y"]}, [("y",), ("x",)]),
        (("0|1|1", "1|0|0"), {"names": ["x", "y", "z"]}, [("y", "z"), ("x",)]),
        (([0, 1, 1], [], [1, 0, 0]), {"names": ["x", "y", "z"]}, [("y", "z"), (), ("x",)]),
        (("0|1", "1|0"), {"names": ["x", "y"]}, [("y",), ("x",)]),
        (("0|1", "1"), {"names": ["x", "y"]}, [("x", "y"), ("y",)]),
        (([1], [0], [1]), {"names": ["x"]}, [("x",), (), ("x",)]),
        (([0], [1], []), {"names": ["x", "y"]}, [("x",), ("y",), ()]),
        (("['x', \"it's\"]", "['y']"), {}, [("x", "it's"), ("y",)]),
        (([1], [2, 3]), {"names": ["1", "2", "3"]}, [("1",), ("2", "3")]),
    ],
)
def test_several_labels(write: Write, labels: Any, task: dict[str, Any], expected: list[Any]) -> None:
    splits = read(write, "multi", lines(*labels), lines(labels[0]), ".jsonl", **task)
    assert [example.labels for example in splits.train] == expected


def test_indicators_need_names_and_a_wrong_separator_is_told(write: Write) -> None:
    assert refused(write, "multi", lines([0, 1, 1]), lines([1, 0, 0]), ".jsonl")[0] == "indicators-without-names"
    assert refused(write, "multi", lines([0, 1], [1, 0]), lines([1, 0]), ".jsonl")[0] == "indicators-without-names"
    mixed = refused(write, "multi", lines([0, 1], [0]), lines([1, 0]), ".jsonl", names=["x", "y"])
    assert mixed[0] == "bad-label" and "line 2" in mixed[1]
    assert refused(write, "multi", lines([1, 0, 0]), lines([1, 0, 0]), ".jsonl", names=["x", "y"])[0] == "bad-label"
    assert refused(write, "multi", lines("['x' 'y']"), lines("x"), ".jsonl")[0] == "bad-label"
    splits = read(write, "multi", lines("x;y", "y;z"), lines("x;y"), ".jsonl")
    assert any("separated by '|'" in note for note in splits.notes)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_names_that_are_numbers_are_no_ids(write: Write, suffix: str) -> None:
    def file(*labels: int) -> str:
        return table(*map(str, labels)) if suffix == ".csv" else lines(*labels)

    good = read(write, "single", file(1, 2, 3), file(1), suffix, names=["1", "2", "3"])
    assert [example.labels for example in good.train] == [("1",), ("2",), ("3",)]
    assert refused(write, "single", file(0, 1, 2), file(1), suffix, names=["1", "2", "3"])[0] == "bad-label"
    own = read(write, "single", file(0, 1), file(1), suffix, names=["0", "1"])
    assert [example.labels for example in own.train] == [("0",), ("1",)]


def test_a_mark_for_no_label_is_told(write: Write) -> None:
    splits = read(write, "single", table(*["yes", "no"] * 20, "-"), table("yes"), ".csv")
    assert any("'-' of 1 training examples" in note for note in splits.notes)


TOKEN = {"text": "a b", "spans": [], "answer": "accept"}
STUDIO = {"data": {"text": "Aspirin"}}


@pytest.mark.parametrize(
    ("kind", "suffix", "content", "code"),
    [
        ("tokens", ".jsonl", json.dumps({**STUDIO, "annotations": [{}]}), "missing-field"),
        ("tokens", ".jsonl", json.dumps({**STUDIO, "annotations": [12]}), "missing-field"),
        ("tokens", ".jsonl", json.dumps({**STUDIO, "annotations": [{"result": [{"type": "labels"}]}]}), "bad-span"),
        ("tokens", ".jsonl", json.dumps({**TOKEN, "tokens": [{"text": "a"}]}), "bad-span"),
        ("tokens", ".csv", "sentence_id,word,tag\n1,a,B-X\n", "unknown-format"),
        ("single", ".jsonl", '{"text": "cut \\ud83d", "label": "a"}', "half-a-character"),
        ("single", ".jsonl", '{"text": "x", "label": ' + "[" * 100_000, "bad-json"),
        ("single", ".json", '{"text": "x", "label": "a"}\n{"text": "y"', "bad-json"),
        ("single", ".json", '[\n{"text": "x"},\n', "bad-json"),
    ],
)
def test_damaged_records_are_refused(write: Write, kind: str, suffix: str, content: str, code: str) -> None:
    found, message = refused(write, kind, content, content, suffix)
    assert found == code
    assert f"train{suffix}" in message


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_another_encoding_is_named(write: Write, encoding: str) -> None:
    write("dev.csv", table("yes", "no"))
    task = {"name": "t", "kind": "single", "score": "accuracy", "columns": COLUMNS, "protocol": {"preset": "english"}}
    path = write("t.yaml", yaml.safe_dump({**task, "files": {"train": "train.csv", "validation": "dev.csv"}}))
    path.with_name("train.csv").write_bytes(table("oui\u2019", "été").encode(encoding))
    loaded, _, folder = load_task(str(path), {})
    with pytest.raises(InputError, match=f"(?i)-f {encoding}"):
        read_splits(loaded, folder)


def test_a_damaged_gzip_file_is_refused(write: Write) -> None:
    packed = bytearray(gzip.compress(table("yes", "no").encode()))
    packed[12] ^= 0xFF
    path = write("t.yaml", "")
    path.with_name("train.csv.gz").write_bytes(packed)
    task = {"name": "t", "kind": "single", "score": "accuracy", "columns": COLUMNS, "protocol": {"preset": "english"}}
    write("t.yaml", yaml.safe_dump({**task, "files": {"train": "train.csv.gz"}}))
    loaded, _, folder = load_task(str(path), {})
    with pytest.raises(InputError, match=r"train\.csv\.gz") as error:
        read_splits(loaded, folder)
    assert error.value.code == "not-readable"


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", lines("yes", "no")),
        (".ndjson", lines("yes", "no")),
        (".csv", "sep=;\r\nlabel;text\r\nyes;t0\r\nno;t1\r\n"),
        (".csv", table("yes", "no")),
    ],
)
def test_files_as_other_tools_write_them(write: Write, suffix: str, content: str) -> None:
    splits = read(write, "single", content, content.replace("t0", "q0"), suffix)
    assert [(example.text, example.labels) for example in splits.train] == [("t0", ("yes",)), ("t1", ("no",))]


def test_names_of_files_with_signs_of_patterns(write: Write) -> None:
    """A file is read by its own name, and a pattern may be an absolute path."""
    path = write("t.yaml", "")
    write("train [v2].csv", table("yes", "no"))
    path.with_name("dev.csv.GZ").write_bytes(gzip.compress(table("no", "yes").encode()))
    files = {"train": "train [v2].csv", "validation": "dev.csv.GZ"}
    task = {"name": "t", "kind": "single", "score": "accuracy", "columns": COLUMNS, "files": files}
    write("t.yaml", yaml.safe_dump({**task, "protocol": {"preset": "english"}}))
    for train in (files["train"], str(path.parent / "tr*v2?.csv")):
        loaded, _, folder = load_task(str(path), {"files.train": train})
        assert len(read_splits(loaded, folder).train) == 2
    for train, code in (("tr**.csv", "file-missing"), ("*.tsv", "file-missing")):
        loaded, _, folder = load_task(str(path), {"files.train": train})
        with pytest.raises(InputError) as error:
            read_splits(loaded, folder)
        assert error.value.code == code


def test_spans_of_named_columns_and_of_words_with_marks(write: Write) -> None:
    """Accents of their own, vowel signs and soft hyphens tear no word apart."""
    text = "e\u0301te\u0301 hyper\u00adtension \u092e\u0927\u0941\u092e\u0947\u0939 (x)"
    train, test = (json.dumps({"note": {"body": body}, "found": [[0, 5, "X"]]}) for body in (text, "Fever"))
    columns = {"text": "note.body", "label": "found"}
    splits = read(write, "tokens", train, test, ".jsonl", columns=columns)
    assert splits.train[0].words == (*text.split()[:3], "(", "x", ")")
    assert splits.train[0].labels == ("B-X", *"OOOOO")


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"ds/state.json": "{}"}, "not-readable"),
        ({"ds/state.json": "{"}, "bad-json"),
        ({"ds/train-0.parquet": "", "ds/test-0.parquet": ""}, "not-a-split"),
    ],
)
def test_damaged_folders_of_datasets_are_refused(write: Write, files: dict[str, str], code: str) -> None:
    for name, content in files.items():
        write(name, content)
    task = {"name": "t", "kind": "single", "score": "accuracy", "columns": COLUMNS, "files": {"train": "ds"}}
    loaded, _, folder = load_task(str(write("t.yaml", yaml.safe_dump({**task, "protocol": {"preset": "english"}}))), {})
    with pytest.raises(InputError, match="/ds") as error:
        read_splits(loaded, folder)
    assert error.value.code == code


def test_an_empty_or_missing_second_text(write: Write) -> None:
    columns = {"text": "text", "pair": "b", "label": "label"}
    rows = [{"text": "a", "b": "x", "label": "y"}, {"text": "c", "b": " ", "label": "n"}]
    good = "".join(json.dumps(row) + "\n" for row in rows)
    splits = read(write, "single", good, json.dumps(rows[0]) + "\n", ".jsonl", columns=columns)
    assert "train.jsonl: 1 examples have an empty text" in splits.notes
    absent = good + json.dumps({"text": "d", "b": None, "label": "n"})
    assert refused(write, "single", absent, good, ".jsonl", columns=columns)[0] == "no-text"


def test_unlabelled_examples_of_a_hugging_face_dataset_are_refused(write: Write) -> None:
    feature = {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": feature}})}
    path = write("t.yaml", "")
    for name, labels in (("train", [0, 1]), ("dev", [1, 0]), ("test", [-1, -1])):
        made = pa.table({"text": [f"{name}{label}" for label in labels], "label": labels})
        parquet.write_table(made.replace_schema_metadata(metadata), path.with_name(f"{name}.parquet"))
    files = {name: f"{file}.parquet" for name, file in (("train", "train"), ("validation", "dev"), ("test", "test"))}
    task = {"name": "t", "kind": "single", "score": "accuracy", "files": files, "columns": COLUMNS}
    write("t.yaml", yaml.safe_dump({**task, "protocol": {"preset": "english"}}))
    loaded, _, folder = load_task(str(path), {})
    with pytest.raises(InputError, match=r"test\.parquet.*files\.test=null"):
        read_splits(loaded, folder)
    loaded, _, _ = load_task(str(path), {"files.test": None})
    assert read_splits(loaded, folder).labels == ("neg", "pos")


CLASS_LABEL = {"_type": "ClassLabel", "names": ["neg", "pos"]}


def hugging_face(write: Write, labels: list[Any], info: Any) -> Splits:
    path = write("t.yaml", "")
    for name in ("train", "dev", "test"):
        made = pa.table({"text": [f"{name}{label}" for label in labels], "label": labels})
        parquet.write_table(
            made.replace_schema_metadata({"huggingface": json.dumps(info)}), path.with_name(f"{name}.parquet")
        )
    files = {name: f"{file}.parquet" for name, file in (("train", "train"), ("validation", "dev"), ("test", "test"))}
    task = {"name": "t", "kind": "single", "score": "accuracy", "files": files, "columns": COLUMNS}
    write("t.yaml", yaml.safe_dump({**task, "protocol": {"preset": "english"}}))
    loaded, _, folder = load_task(str(path), {})
    return read_splits(loaded, folder)


def test_ids_of_classes_that_are_floats_have_names(write: Write) -> None:
    """pandas writes ids so where a column has gaps."""
    assert hugging_face(write, [0.0, 1.0], {"info": {"features": {"label": CLASS_LABEL}}}).labels == ("neg", "pos")


@pytest.mark.parametrize(
    "info", ["x", {"info": {"features": [1]}}, {"info": {"features": {"label": {"_type": "ClassLabel"}}}}]
)
def test_metadata_that_describe_no_columns_are_refused(write: Write, info: Any) -> None:
    with pytest.raises(InputError, match=r"train\.parquet") as error:
        hugging_face(write, [0, 1], info)
    assert error.value.code == "not-readable"


def test_brat_tells_what_it_leaves_out_and_why_offsets_are_wrong(write: Write) -> None:
    for name in ("train", "dev", "test"):
        write(f"{name}/a.txt", f"Pain {name}.\r\nÉté: Aspirin.\r\n")
        write(f"{name}/plain.txt", "No drug.")
        write(f"{name}/a.ann", f"T1\tDrug {13 + len(name)} {20 + len(name)}\tAspirin\nA1\tNegated T1\n")
    files = {"train": "train", "validation": "dev", "test": "test"}
    task = {"name": "t", "kind": "tokens", "score": "entity_f1", "files": files, "protocol": {"preset": "english"}}
    path = write("t.yaml", yaml.safe_dump(task))
    loaded, _, folder = load_task(str(path), {})
    splits = read_splits(loaded, folder)
    assert [example.labels for example in splits.train][1] == ("O", "O", "B-Drug", "O")
    assert "train: 1 texts without an .ann file beside them, left out" in splits.notes
    write("test/a.ann", "T1\tDrug 15 22\tAspirin\n")
    with pytest.raises(InputError, match="CR LF as two"):
        read_splits(loaded, folder)


def test_annotation_tools_tell_what_they_leave_out(write: Write) -> None:
    label = {"value": {"start": 0, "end": 7, "labels": ["Drug", "Chemical"]}, "type": "labels"}
    hidden = {"value": {"hypertextlabels": ["Drug"]}, "type": "hypertextlabels"}
    annotations = [{"result": [label, hidden, {"type": "relation"}]}, {"result": []}]
    rows = [
        {"annotations": annotations, "data": {"text": "Aspirin helps"}},
        {"text": "No drug", "tokens": [], "answer": "accept"},
        {"tokens": [], "ner_tags": []},
    ]
    test = json.dumps({"text": "Ibuprofen", "label": [[0, 9, "Drug"]]})
    splits = read(write, "tokens", "".join(json.dumps(row) + "\n" for row in rows), test, ".jsonl")
    assert [example.labels for example in splits.train] == [("B-Drug", "O"), ("O", "O")]
    told = "; ".join(splits.notes)
    for what in ("further labels of a span", "further annotations", "hypertextlabels", "relation", "without words"):
        assert what in told
