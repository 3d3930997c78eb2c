"""Examples of a downstream task, read from its files: CoNLL, JSON, JSON lines, TSV or CSV."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from studies.tasks import EvaluatedTask, Protocol, Task, load_task

_TAG = re.compile(r"O|[BI](-\S+)?")


@dataclass(frozen=True)
class Example:
    """One labelled text."""

    location: str
    """File and line, for messages."""
    text: str
    pair: str | None
    """Second text of a sentence pair."""
    words: tuple[str, ...]
    """Words of a token classification, which are joined by spaces in `text`; each has one label."""
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """The examples of a task."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    """Equal to `validation` if there is no test file."""
    labels: tuple[str, ...]
    """All labels in `train`, sorted. For token classification: O, and B- and I- of each type."""


def load_examples(evaluated: EvaluatedTask) -> tuple[Task, Protocol, Splits]:
    """Load a task, its protocol and its examples.

    Raises:
        InputError: The task, the protocol or a file is wrong.
    """
    task, protocol, folder = load_task(evaluated.task, evaluated.protocol)
    return task, protocol, read_splits(task, Path(evaluated.data) if evaluated.data else folder)


def read_splits(task: Task, data: Path) -> Splits:
    """Read every example of a task.

    Args:
        task: The task.
        data: Folder of its files.

    Raises:
        InputError: A file is missing or wrong; the message names file and line.
    """
    train = _read_file(task, data / task.files.train)
    if task.files.validation is not None:
        validation = _read_file(task, data / task.files.validation)
    else:
        validation = tuple(example for example in train if _is_held_out(example))
        train = tuple(example for example in train if not _is_held_out(example))
        if not (train and validation):
            raise InputError(
                f"{data / task.files.train} has too few examples to hold some out for validation",
                key="files.validation",
            )
    test = _read_file(task, data / task.files.test) if task.files.test is not None else validation
    labels = _labels(task, train)
    for example in (*validation, *test):
        for label in example.labels:
            if label not in labels:
                raise InputError(
                    f"{example.location}: label {label!r} does not occur in training ({data / task.files.train}), so "
                    f"no model can learn it; training has {', '.join(labels[:12])}",
                    code="unknown-label",
                )
    if task.positive is not None and task.positive not in labels:
        raise InputError(
            f"task {task.name}: positive: no training example has the label {task.positive!r}; "
            f"training has {', '.join(labels)}",
            key="positive",
        )
    return Splits(train, validation, test, labels)


def _read_file(task: Task, path: Path) -> tuple[Example, ...]:
    if not path.is_file():
        source = f"; {task.source}" if task.source else ""
        raise InputError(
            f"task {task.name}: no file {path}; give its folder with --data{source}", key="--data", code="file-missing"
        )
    try:
        examples = tuple(_conll(path) if task.kind == "tokens" else _records(path, task))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})", code="not-utf-8") from None
    if not examples:
        raise InputError(f"{path} holds no example", code="no-examples")
    return examples


def _labels(task: Task, train: Sequence[Example]) -> tuple[str, ...]:
    """List the labels of training. An entity type with either tag gets both, because a longer entity needs I-."""
    labels = {label for example in train for label in example.labels}
    if task.kind == "tokens":
        types = {label[1:] for label in labels if label != "O"}
        labels = {"O"} | {tag + type_ for type_ in types for tag in "BI"}
    return tuple(sorted(labels))


def _conll(path: Path) -> Iterator[Example]:
    words: list[str] = []
    tags: list[str] = []
    first_line = 1
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate([*lines, ""], 1):
        columns = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or columns[0] == "-DOCSTART-":
            if words:
                yield Example(f"{path}, line {first_line}", " ".join(words), None, tuple(words), tuple(tags))
            words, tags, first_line = [], [], number + 1
            continue
        if len(columns) < 2 or not columns[0].strip():
            raise InputError(
                f"{path}, line {number}: expected a token and its BIO tag, got {line!r}", code="bad-token-line"
            )
        tag = columns[-1].strip()
        if not _TAG.fullmatch(tag):
            raise InputError(
                f"{path}, line {number}: {tag!r} is no BIO tag; expected O, B-TYPE, I-TYPE, B or I", code="bad-tag"
            )
        words.append(columns[0])
        tags.append(tag)


def _records(path: Path, task: Task) -> Iterator[Example]:
    columns = task.columns
    assert columns is not None
    for number, record in _rows(path):
        location = f"{path}, line {number}"
        text, pair = (
            " ".join(str(_value(record, key, location)) for key in keys) if keys else None
            for keys in (columns.text, columns.pair)
        )
        label = _value(record, columns.label, location)
        if task.kind == "single":
            labels = [label]
        else:
            labels = label if isinstance(label, list) else [part for part in str(label).split(task.separator) if part]
        yield Example(location, text or "", pair, (), tuple(str(label).strip() for label in labels))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and record; for a .json file, the number of the record."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _json(line, f"{path}, line {number}", dict)
    elif path.suffix == ".json":
        yield from enumerate(_json(text, str(path), list), 1)
    elif path.suffix in (".tsv", ".csv"):
        style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        reader = csv.DictReader(text.splitlines(), strict=True, **style)
        for record in reader:
            if None in record or None in record.values():
                raise InputError(
                    f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} columns as in the header",
                    code="bad-column-count",
                )
            yield reader.line_num, record
    else:
        raise InputError(
            f"{path}: not a task file that Detour reads; it reads .jsonl, .json, .tsv and .csv", code="unknown-format"
        )


def _json(text: str, location: str, expected: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{location}: not valid JSON ({error})", code="bad-json") from None
    if not isinstance(value, expected):
        wanted = "an array of objects" if expected is list else "an object"
        raise InputError(f"{location}: expected {wanted}", code="bad-json")
    return value


def _value(record: Any, key: str, location: str) -> Any:
    value = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            present = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{location}: no {key!r} here; it has {present}", code="missing-field")
        value = value[part]
    return value


def _is_held_out(example: Example) -> bool:
    return hashlib.sha256(f"{example.text}\0{example.pair}".encode()).digest()[0] < 256 / 10
