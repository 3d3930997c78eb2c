"""The reader of each task file, by its kind and suffix."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InputError
from studies.formats.conll import read_brat, read_conll
from studies.formats.example import Example, Notes
from studies.formats.files import suffix_of
from studies.formats.records import read_texts, read_tokens
from studies.tasks import Task

RECORDS = (".jsonl", ".json", ".parquet", ".arrow")
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
    paths = sorted(data.glob(name)) if any(sign in name for sign in "*?[") else [data / name]
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
    return examples


def _read(task: Task, path: Path, notes: Notes) -> list[Example]:
    if task.kind != "tokens":
        return list(read_texts(path, task))
    if path.is_dir() and next(path.rglob("*.ann"), None):
        return list(read_brat(path, task, notes))
    if path.is_dir() or suffix_of(path) in RECORDS:
        return list(read_tokens(path, task, notes))
    return list(read_conll(path, task, notes))
