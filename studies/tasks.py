"""Downstream tasks: what a task YAML says, and the examples its files hold."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.errors import InputError
from configs.load import read_mapping, read_yaml, validate
from configs.schema import Paths, Section

SHIPPED = resources.files("studies") / "tasks_described"
_TAG = re.compile(r"O|[BI](-\S+)?")


class Protocol(Section):
    """How a model is fine-tuned."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    lr: PositiveFloat
    head_lr: PositiveFloat | None = None
    """Learning rate of the new head; the encoder's if not given."""
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps; the rate falls linearly to zero afterwards."""
    batch: PositiveInt
    length: PositiveInt = 512
    """Longest example in tokens; words beyond it count as not found."""
    examples: PositiveInt | None = None
    """Only the first so many examples of training, and of validation."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give one of epochs and steps")
        return self


PROTOCOLS: dict[str, dict[str, Any]] = {
    "english": {"epochs": 10, "lr": 5e-5, "weight_decay": 0.01, "batch": 16, "length": 512},
    "english-ner": {"epochs": 20, "lr": 5e-5, "weight_decay": 0.01, "batch": 16, "length": 512},
    "french": {"epochs": 15, "lr": 2e-5, "warmup": 0.1, "batch": 4, "length": 2048},
    "french-ner": {"steps": 4000, "lr": 5e-5, "head_lr": 1e-3, "batch": 16, "length": 1024},
}
"""Those of arXiv 2605.12438. All keep the weights of the best validation score. What it does not state of the French
ones, the weight decay, is taken from the English ones."""


class Files(Section):
    train: str
    validation: str | None = None
    """If not given, every tenth training example by a hash of its content."""
    test: str | None = None
    """If not given, the validation examples are the ones reported, and the report says so."""


class Columns(Section):
    """Where an example's parts are: columns of a table or keys of an object; dots go into nested objects."""

    text: Paths
    """More than one are joined by spaces."""
    pair: Paths = ()
    """The second text of a sentence pair."""
    label: str


class Task(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = ""
    source: str = ""
    """Where the data is obtained."""
    licence: str = ""
    kind: Literal["tokens", "single", "multi"]
    """Token classification (CoNLL columns: token first, BIO tag last), one label each, or any number of labels each."""
    score: Literal["entity_f1", "micro_f1", "macro_f1", "weighted_f1", "binary_f1", "accuracy"]
    positive: str | None = None
    """The label that binary_f1 scores."""
    files: Files
    columns: Columns | None = None
    """Not for tokens."""
    separator: str = "|"
    """Between the labels of a `multi` example where they are one string."""
    protocol: dict[str, Any] = Field(default_factory=dict)
    """`preset` (english, english-ner, french, french-ner) and what differs from it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "tokens") != (self.score == "entity_f1"):
            raise ValueError("score entity_f1 belongs to kind tokens, the other scores to single and multi")
        if (self.kind == "tokens") != (self.columns is None):
            raise ValueError("columns are given for single and multi; token files need none")
        if (self.score == "binary_f1") != (self.positive is not None):
            raise ValueError("binary_f1 needs positive, the label it scores; other scores have none")
        if self.kind == "multi" and self.score in ("accuracy", "binary_f1"):
            raise ValueError("multi is scored by micro_f1, macro_f1 or weighted_f1")
        return self


@dataclass(frozen=True)
class Example:
    where: str
    """File and line, for messages."""
    text: str
    pair: str | None
    words: tuple[str, ...]
    """Of token classification, joined by spaces in `text`; one label a word."""
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    """The validation examples where there is no test file."""
    labels: tuple[str, ...]
    """All there are in training, sorted; of token classification B- and I- of each type, and O."""


def load_task(reference: str, overrides: Sequence[str] = ()) -> tuple[Task, Protocol, Path]:
    """A task YAML or the name of a described task, its protocol, and its folder.

    `key=value` overrides are of the protocol, or of the task's files (`files.test=dev.tsv`, `files.test=null`).

    Raises InputError naming the key.
    """
    tree, folder = read_mapping(reference, "task", SHIPPED)
    changes = {key: read_yaml(value, key) for key, _, value in (override.partition("=") for override in overrides)}
    if isinstance(tree.get("files"), dict):
        files = {key.removeprefix("files."): changes.pop(key) for key in list(changes) if key.startswith("files.")}
        tree["files"] = {**tree["files"], **files}
    task = validate(Task, tree, reference)
    settings = dict(task.protocol)
    preset = settings.pop("preset", None)
    if preset is not None and preset not in PROTOCOLS:
        raise InputError(f"{reference}: protocol.preset: no {preset!r}; there are {', '.join(PROTOCOLS)}")
    settings = {**PROTOCOLS.get(preset, {}), **settings}
    for key, other in (("epochs", "steps"), ("steps", "epochs")):
        if key in changes:
            settings.pop(other, None)
    settings |= changes
    return task, validate(Protocol, settings, f"{reference}: protocol"), folder


def read_splits(task: Task, data: Path) -> Splits:
    """Every example of a task whose files lie under `data`. Raises InputError naming file and line."""

    def read(name: str) -> tuple[Example, ...]:
        path = data / name
        if not path.is_file():
            where = f"; {task.source}" if task.source else ""
            raise InputError(f"task {task.name}: no file {path}; give the folder that holds it with --data{where}")
        try:
            found = tuple(_conll(path) if task.kind == "tokens" else _records(path, task))
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error})") from None
        if not found:
            raise InputError(f"{path} holds no example")
        return found

    train = read(task.files.train)
    if task.files.validation is not None:
        validation = read(task.files.validation)
    else:
        validation = tuple(example for example in train if _held_out(example))
        train = tuple(example for example in train if not _held_out(example))
        if not (train and validation):
            raise InputError(f"{data / task.files.train} has too few examples to hold some out for validation")
    test = read(task.files.test) if task.files.test is not None else validation
    known = {label for example in train for label in example.labels}
    if task.kind == "tokens":
        types = {label[1:] for label in known if label != "O"}
        known = {"O"} | {side + type_ for type_ in types for side in "BI"}
    for example in (*validation, *test):
        for label in example.labels:
            if label not in known:
                raise InputError(
                    f"{example.where}: label {label!r} does not occur in training ({data / task.files.train}), so no "
                    f"model can learn it; it has {', '.join(sorted(known)[:12])}"
                )
    if task.positive is not None and task.positive not in known:
        raise InputError(f"task {task.name}: positive: no example is labelled {task.positive!r}; {sorted(known)}")
    return Splits(train, validation, test, tuple(sorted(known)))


def _conll(path: Path) -> Iterator[Example]:
    words: list[str] = []
    tags: list[str] = []
    first = 1
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate([*lines, ""], 1):
        columns = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or columns[0] == "-DOCSTART-":
            if words:
                yield Example(f"{path}, line {first}", " ".join(words), None, tuple(words), tuple(tags))
            words, tags, first = [], [], number + 1
            continue
        if len(columns) < 2 or not columns[0].strip():
            raise InputError(f"{path}, line {number}: expected a token and its BIO tag, got {line!r}")
        tag = columns[-1].strip()
        if not _TAG.fullmatch(tag):
            raise InputError(f"{path}, line {number}: {tag!r} is no BIO tag; expected O, B-TYPE, I-TYPE, B or I")
        words.append(columns[0])
        tags.append(tag)


def _records(path: Path, task: Task) -> Iterator[Example]:
    columns = task.columns
    assert columns is not None
    for number, record in _rows(path):
        where = f"{path}, line {number}"
        text, pair = (
            " ".join(str(_value(record, key, where)) for key in keys) if keys else None
            for keys in (columns.text, columns.pair)
        )
        label = _value(record, columns.label, where)
        if task.kind == "single":
            labels = [label]
        else:
            labels = label if isinstance(label, list) else [part for part in str(label).split(task.separator) if part]
        yield Example(where, text or "", pair, (), tuple(str(label).strip() for label in labels))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (of a .json file: of the record) and record."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _json(line, f"{path}, line {number}")
    elif path.suffix == ".json":
        for number, record in enumerate(_json(text, str(path), list), 1):
            yield number, record
    elif path.suffix in (".tsv", ".csv"):
        style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        reader = csv.DictReader(text.splitlines(), strict=True, **style)
        for record in reader:
            if None in record or None in record.values():
                raise InputError(
                    f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} columns as in the header"
                )
            yield reader.line_num, record
    else:
        raise InputError(f"{path}: not a task file Detour reads; it reads .jsonl, .json, .tsv and .csv")


def _json(text: str, where: str, kind: type = dict) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected {'an array of objects' if kind is list else 'an object'}")
    return value


def _value(record: Any, key: str, where: str) -> Any:
    value = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            held = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{where}: no {key!r} here; it has {held}")
        value = value[part]
    return value


def _held_out(example: Example) -> bool:
    return hashlib.sha256(f"{example.text}\0{example.pair}".encode()).digest()[0] < 256 / 10
