"""The splits of a downstream task, and what is told about them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from studies.formats.example import Example, Notes
from studies.formats.read import read_file
from studies.tasks import EvaluatedTask, Protocol, Task, load_task

NO_LABEL = ("-", "-1", "?", "_")
"""Marks that data sets such as SNLI put where annotators disagreed."""
RARE = 0.05
"""Share of the training examples below which such a mark is told of."""


@dataclass(frozen=True)
class Splits:
    """The examples of a task."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    """All validation examples if there is no test file."""
    labels: tuple[str, ...]
    """All labels in `train`, sorted. For token classification: O, and B- and I- of each type. Empty for regression."""
    scored: tuple[str, ...]
    """Labels that are scored: the task's `scored`, else those of all splits."""
    notes: tuple[str, ...] = ()
    """Lines about what was changed, left out, or occurs twice."""


def load_examples(evaluated: EvaluatedTask) -> tuple[Task, Protocol, Splits]:
    """Load a task, its protocol and its examples.

    Raises:
        InputError: The task, the protocol or a file is wrong.
    """
    task, protocol, folder = load_task(evaluated.task, evaluated.protocol)
    return task, protocol, read_splits(task, Path(evaluated.data) if evaluated.data else folder, protocol.examples)


def read_splits(task: Task, data: Path, few: int | None = None) -> Splits:
    """Read every example of a task.

    Args:
        task: The task.
        data: Folder of its files.
        few: Number of training examples, and of validation examples, that are kept; default: all.

    Raises:
        InputError: A file is missing or wrong; the message names file and line. Or the test file is another split.
    """
    if task.kind == "masked":
        raise InputError(
            f"task {task.name} is measured without fine-tuning; use detour probe", key="--task", code="masked-task"
        )
    assert task.files.train is not None
    notes: list[str] = []

    def read(name: str) -> tuple[Example, ...]:
        found = Notes()
        examples = read_file(task, data, name, found)
        notes.extend(f"{name}: {count:,} {what}" for what, count in found.items() if count)
        empty = sum(not (example.text.strip() and (example.pair or "-").strip()) for example in examples)
        if empty:
            notes.append(f"{name}: {empty:,} examples have an empty text")
        return examples

    train = read(task.files.train)
    if task.files.validation is not None:
        validation = read(task.files.validation)
    else:
        validation = tuple(example for example in train if _is_held_out(example))
        train = tuple(example for example in train if not _is_held_out(example))
        if not (train and validation):
            raise InputError(
                f"{data / task.files.train} has too few examples to hold some out for validation",
                key="files.validation",
            )
    test = read(task.files.test) if task.files.test is not None else validation
    notes += _repeated(task, train, validation, test)
    all_labels = _labels(task, train)
    train, validation = _chosen(train, few), _chosen(validation, few)
    labels = _labels(task, train)
    _require_a_choice(task, data, train, test, labels, few)
    notes += _doubtful(task, train, labels)
    occurring = {label for example in (*validation, *test) for label in example.labels}
    if task.kind == "regression":
        occurring = set()
    notes += _unseen(task, labels, {"validation": validation, "test": test} if task.files.test else {"test": test})
    scored = task.scored or tuple(sorted(occurring.union(labels)))
    positive = (task.positive,) if task.positive is not None else ()
    for key, named, known in (("positive", positive, labels), ("scored", task.scored, all_labels)):
        missing = [label for label in named if label not in known]
        if missing:
            raise InputError(
                f"task {task.name}: {key}: no training example has the label {', '.join(map(repr, missing))}; "
                f"training has {', '.join(known)}",
                key=key,
            )
    return Splits(train, validation, test, labels, scored, tuple(notes))


def _labels(task: Task, train: Sequence[Example]) -> tuple[str, ...]:
    """List the labels of training. An entity type with either tag gets both, because a longer entity needs I-."""
    if task.kind == "regression":
        return ()
    labels = {label for example in train for label in example.labels}
    if task.kind == "tokens":
        types = {label[1:] for label in labels if label != "O"}
        labels = {"O"} | {tag + type_ for type_ in types for tag in "BI"}
    return tuple(sorted(labels))


def _require_a_choice(
    task: Task, data: Path, train: Sequence[Example], test: Sequence[Example], labels: Sequence[str], few: int | None
) -> None:
    """Require labels that differ in training, and test labels that a model can hit.

    Raises:
        InputError: Training has one label, or the test labels are hidden.
    """
    wanted = "an entity" if task.kind == "tokens" else "two different labels"
    numbers = {example.labels for example in train} if task.kind == "regression" else set(labels)
    if len(numbers) < (1 if task.kind == "multi" else 2):
        types = f" of the types {', '.join(task.types)}" if task.types else ""
        part = f"the {len(train):,} examples that `examples` keeps lack" if few else "it lacks"
        raise InputError(
            f"{data / str(task.files.train)}: no model can learn from it, because {part} {wanted}{types}",
            key="examples" if few else "files.train",
            code="nothing-to-learn",
        )
    tested = {label for example in test for label in example.labels}
    if task.kind == "tokens":
        tested -= {"O"}
    reason = ""
    if task.kind == "regression":
        reason = "all its numbers are equal, so no correlation is defined" if len(tested) < 2 else ""
    elif not tested & set(labels):
        reason = f"none of its labels occurs in training ({', '.join(sorted(tested)[:8]) or 'it has none'})"
    if reason:
        raise InputError(
            f"{data / str(task.files.test or task.files.validation or task.files.train)}: {reason}; if its labels are "
            "hidden, set files.test=null to be scored on validation",
            key="files.test",
            code="test-without-labels",
        )


def _doubtful(task: Task, train: Sequence[Example], labels: Sequence[str]) -> list[str]:
    """Tell of labels that may be written in two ways, or not be separated."""
    counted = Counter(example.labels[0] for example in train if task.kind == "single")
    lines = [
        f"label {label!r} of {count:,} training examples may mark that they have none; if so, leave them out"
        for label, count in counted.items()
        if label in NO_LABEL and count < RARE * len(train)
    ]
    spelled: dict[str, list[str]] = {}
    for label in (label for label in labels if task.kind != "tokens" or not label.startswith("I")):
        spelled.setdefault(label.casefold(), []).append(label)
    lines += [f"labels that differ in case only: {', '.join(names)}" for names in spelled.values() if len(names) > 1]
    if task.kind == "multi" and all(len(example.labels) < 2 for example in train):
        lines.append(f"no training example has two labels; they are separated by {task.separator!r}")
    return lines


def _unseen(task: Task, labels: Sequence[str], parts: dict[str, Sequence[Example]]) -> list[str]:
    """Tell how many labels a split has that training lacks; they count as misses."""
    lines = []
    for name, examples in parts.items():
        if task.kind == "regression":
            continue
        counted = Counter(label for example in examples for label in example.labels if label not in labels)
        if task.kind == "tokens":
            counted = Counter({label[2:]: count for label, count in counted.items() if label.startswith("B")})
        if counted:
            named = ", ".join(f"{label} ({count:,})" for label, count in counted.most_common(8))
            lines.append(
                f"{name}: {sum(counted.values()):,} labels do not occur in training and count as misses: {named}"
            )
    return lines


def _repeated(
    task: Task, train: Sequence[Example], validation: Sequence[Example], test: Sequence[Example]
) -> list[str]:
    """Tell how many test examples are copies of training or validation examples.

    Raises:
        InputError: The test examples are another split's, so the best epoch would be chosen on it.
    """
    if task.files.test is None:
        return ["no test file: the scores are of the validation examples, which also choose the best epoch"]
    lines = []
    tested = Counter(map(_content, test))
    for name, others in (("training", train), ("validation", validation)):
        contents = Counter(map(_content, others))
        if contents == tested:
            raise InputError(
                f"task {task.name}: files.test: the test examples are the {name} examples, so the score would be "
                "chosen or learned on them; give a file of its own, or files.test=null to be scored on validation",
                key="files.test",
                code="test-is-another-split",
            )
        copies = sum(count for content, count in tested.items() if content in contents)
        if copies:
            lines.append(f"test: {copies:,} of {len(test):,} examples are copies of {name} examples")
    return lines


def _content(example: Example) -> tuple[str, str | None]:
    return " ".join(example.text.lower().split()), example.pair and " ".join(example.pair.lower().split())


def _is_held_out(example: Example) -> bool:
    return _draw(example)[0] < 256 / 10


def _chosen(examples: tuple[Example, ...], few: int | None) -> tuple[Example, ...]:
    """Choose some examples by their content, because the first of a sorted file may have one label."""
    if few is None or few >= len(examples):
        return examples
    numbers = sorted(range(len(examples)), key=lambda number: _draw(examples[number]))[:few]
    return tuple(examples[number] for number in sorted(numbers))


def _draw(example: Example) -> bytes:
    return hashlib.sha256(f"{example.text}\0{example.pair}".encode()).digest()
