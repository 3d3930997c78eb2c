"""The reader of each task file, by its kind and suffix."""

from __future__ import annotations

import re
from pathlib import Path

from configs.errors import InputError
from studies.formats.conll import read_brat, read_conll
from studies.formats.example import Example, Notes
from studies.formats.files import read_text, suffix_of
from studies.formats.records import read_texts, read_tokens
from studies.formats.tags import is_tag
from studies.tasks import Task

RECORDS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
"""Suffixes of token files that hold records; the other token files are CoNLL columns."""


def read_file(task: Task, data: Path, name: str, notes: Notes) -> tuple[Example, ...]:
    """Read a split of a task.

    Args:
        task: The task.
        data: Folder of its files.
        name: File, folder or pattern such as `data/train-*.parquet`.
        notes: Receives what was changed or left out.

    Raises:
        InputError: A file is missing or wrong; the message names file and line.
    """
    paths = [data / name]
    if not paths[0].exists() and any(sign in name for sign in "*?["):
        root = Path(paths[0].anchor) if Path(name).is_absolute() else data
        try:
            paths = sorted(root.glob(str(paths[0].relative_to(root))))
        except ValueError as error:
            raise InputError(f"task {task.name}: {name}: {error}", key="files", code="file-missing") from None
    if not paths or not all(path.exists() for path in paths):
        source = f"; {task.source}" if task.source else ""
        raise InputError(
            f"task {task.name}: no file {data / name}; give its folder with --data{source}",
            key="--data",
            code="file-missing",
        )
    examples = tuple(example for path in paths for example in _read(task, path, notes))
    if not examples:
        raise InputError(f"{data / name} holds no example", code="no-examples")
    for example in examples:
        _require_characters(example)
    return examples


def _read(task: Task, path: Path, notes: Notes) -> list[Example]:
    if task.kind != "tokens":
        return list(read_texts(path, task))
    if path.is_dir() and next(path.rglob("*.ann"), None):
        return list(read_brat(path, task, notes))
    if path.is_dir() or suffix_of(path) in RECORDS:
        return list(read_tokens(path, task, notes))
    if suffix_of(path) == ".csv" and _is_table(read_text(path).partition("\n")[0]):
        raise InputError(
            f"{path}: tables in CSV are not read for words with tags; write a word and its tag per line, with a tab "
            "between them and an empty line between sentences",
            code="unknown-format",
        )
    return list(read_conll(path, task, notes))


def _is_table(header: str) -> bool:
    """Return whether the first line of a file has its columns between commas or semicolons."""
    return "\t" not in header and len(re.split("[,;]", header)) > 1 and not is_tag(header.split()[-1])


def _require_characters(example: Example) -> None:
    """Require that no text holds half of a surrogate pair, which UTF-8 cannot state and no tokenizer takes.

    Raises:
        InputError: One does.
    """
    try:
        "".join((example.text, example.pair or "", *example.labels)).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{example.location}: it holds {error.object[error.start]!a}, half of a character that was cut in two; "
            "write the text or label without it",
            code="half-a-character",
        ) from None
