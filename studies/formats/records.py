"""Examples of records: texts with classes or a number, words with tags, and texts with entities in characters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from datapipe.where import NoFieldError, field
from studies.formats.conll import require_same_text
from studies.formats.example import Example, Notes
from studies.formats.files import read_records
from studies.formats.tags import Span, example_of_spans, to_bio
from studies.tasks import Task

WORDS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "ner", "labels", "label")
SPANS = ("spans", "entities", "labels", "label")
"""Names of the columns of `tokens` tasks, in the order in which they are looked for. `columns` names others."""
_UNLABELLED = "; if the examples have no labels, leave them out, or set files.test=null"
_WHOLE = re.compile(r"(-?\d+)\.0+")
_ID = re.compile(r"\d+(\.0+)?")
_MISSING = ("nan", "na", "n/a", "none", "null", "<na>", "nat")
"""How R, pandas, SQL and Python write a missing value, in lower case."""


def read_texts(path: Path, task: Task) -> Iterator[Example]:
    """Yield the examples of a `single`, `multi` or `regression` task.

    Raises:
        InputError: A column is missing, or a value is no label.
    """
    columns = task.columns
    assert columns is not None
    for location, record in read_records(path, [*columns.text, *columns.pair, columns.label]):
        text, pair = (
            " ".join(_text(_value(record, key, location), key, location) for key in keys) if keys else None
            for keys in (columns.text, columns.pair)
        )
        label = _value(record, columns.label, location)
        yield Example(location, text or "", pair, (), _labels(label, task, location))


def read_tokens(path: Path, task: Task, notes: Notes) -> Iterator[Example]:
    """Yield the examples of a `tokens` task: words with tags, or the spans of doccano, Prodigy and Label Studio.

    Raises:
        InputError: A record has neither, or a tag or span is wrong.
    """
    for location, record in read_records(path, ()):
        if record.get("answer", "accept") != "accept":
            notes["records that were not accepted, left out"] += 1
            continue
        if "annotations" in record and isinstance(record.get("data"), dict):
            found = _label_studio(record, location, notes)
            if found is None:
                notes["records without an annotation, left out"] += 1
                continue
            yield example_of_spans(found[0], found[1], task.types, location, notes)
            continue
        words = _first(record, task.columns.text if task.columns else WORDS)
        tags = _first(record, (task.columns.label,) if task.columns else TAGS)
        if words == [] and not tags and "text" not in record:
            notes["records without words, left out"] += 1
            continue
        if _is_list_of(words, str) and isinstance(tags, list) and len(words) == len(tags) and not _are_spans(tags):
            named = [_name(tag, task, location) for tag in tags]
            bio = to_bio(named, task.types, location, notes)
            yield Example(location, " ".join(words), None, tuple(words), bio)
            continue
        text = _first(record, ("text",))
        spans = _first(record, (task.columns.label,) if task.columns else SPANS)
        if spans is None and "answer" in record:
            spans = []  # Prodigy leaves the key out of an accepted text without entities
        if not isinstance(text, str) or not isinstance(spans, list):
            raise InputError(
                f"{location}: expected words and as many tags ({', '.join(WORDS)}; {', '.join(TAGS)}), or a text and "
                f"a list of spans ({', '.join(SPANS)}); it has {', '.join(record)}. `columns` names other columns",
                code="missing-field",
            )
        places = [(word["start"], word["end"]) for word in words] if _is_list_of(words, dict) else None
        read = [_span(span, text, location) for span in spans]
        yield example_of_spans(text, read, task.types, location, notes, places)


def _value(record: dict[str, Any], key: str, location: str) -> Any:
    try:
        return field(record, key)
    except NoFieldError as error:
        raise InputError(f"{location}: {error}", key=f"columns.{key}", code="missing-field") from None


def _text(value: Any, key: str, location: str) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, str) and not is_number:
        raise InputError(f"{location}: {key} is no text but {value!r}", key=f"columns.{key}", code="no-text")
    return str(value)


def _labels(value: Any, task: Task, location: str) -> tuple[str, ...]:
    """Read the classes or the number of one example."""
    if task.kind == "regression":
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{location}: the label {value!r} is no number{_UNLABELLED}", code="bad-label")
        return (repr(number),)
    if task.kind == "multi" and isinstance(value, str):
        if value.strip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                raise InputError(
                    f"{location}: the label {value!r} is no JSON list; give the labels with the separator "
                    f"{task.separator!r}",
                    code="bad-label",
                ) from None
        else:
            value = [part for part in value.split(task.separator) if part.strip()]
    if not isinstance(value, list):
        value = [value]
    if task.kind == "single" and len(value) != 1:
        raise InputError(
            f"{location}: {len(value)} labels where kind single has one; set kind: multi", code="bad-label"
        )
    if task.kind == "multi" and _is_indicator(value):
        if len(value) != len(task.names):
            raise InputError(
                f"{location}: {value} states 0 or 1 for each of {len(value)} classes; give these classes in the "
                "task's `names`",
                key="names",
                code="indicators-without-names",
            )
        return tuple(name for name, is_there in zip(task.names, value, strict=True) if is_there)
    return tuple(dict.fromkeys(_name(label, task, location) for label in value))


def _is_indicator(value: list[Any]) -> bool:
    """Return whether a list states 0 or 1 per class. Ids of classes differ from each other and are no floats."""
    are_bits = all(isinstance(part, int | float) and part in (0, 1) for part in value)
    return are_bits and bool(value) and (len(set(value)) < len(value) or not all(type(part) is int for part in value))


def _name(label: Any, task: Task, location: str) -> str:
    """Return the name of a class, or a tag. What `names` lists is a class, whatever it looks like."""
    if isinstance(label, str) and label.strip() in task.names:
        return label.strip()
    if isinstance(label, str) and task.names and task.kind != "tokens" and _ID.fullmatch(label.strip()):
        label = float(label)  # a table's ids are strings
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool):
        if task.names:
            if not 0 <= label < len(task.names):
                raise InputError(f"{location}: label {label} has no name among {len(task.names)} `names`", key="names")
            return task.names[label]
        if task.kind == "tokens":
            raise InputError(
                f"{location}: the tag {label} is an id; give the tags in the task's `names`, in the order of ids",
                key="names",
                code="tags-without-names",
            )
    name = str(label).strip()
    if isinstance(label, str) and name.lower() in _MISSING:
        raise InputError(
            f"{location}: the label {name} reads as a missing value{_UNLABELLED}; if it is a class, list all "
            "classes in the task's `names`",
            code="bad-label",
        )
    if not isinstance(label, str | int) or not name:
        hint = (
            "; set kind: regression for numbers" if isinstance(label, float) and math.isfinite(label) else _UNLABELLED
        )
        raise InputError(f"{location}: {label!r} is no label{hint}", code="bad-label")
    if task.kind == "single" and _is_fraction(name):
        raise InputError(
            f"{location}: the label {name} is a number; set kind: regression, or list the codes in the task's `names`",
            code="bad-label",
        )
    whole = _WHOLE.fullmatch(name) if task.kind == "single" else None
    return whole[1] if whole else name  # 0.0 is the class 0, which a table with gaps writes as a float


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except (ValueError, OverflowError):
        return False


def _first(record: dict[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if name in record), None)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, kind) for part in value)


def _are_spans(value: list[Any]) -> bool:
    return any(isinstance(part, list | dict) for part in value)


def _span(span: Any, text: str, location: str) -> Span:
    """Read `[start, end, label]`, or an object with these under the names that doccano, Prodigy and others use."""
    if isinstance(span, dict):
        labels = span.get("labels")
        span = [
            _first(span, ("start", "start_offset")),
            _first(span, ("end", "end_offset")),
            labels[0] if isinstance(labels, list) and labels else _first(span, ("label", "type")),
            span.get("text"),
        ]
    if not isinstance(span, list) or len(span) < 3 or not all(isinstance(place, int) for place in span[:2]):
        raise InputError(f"{location}: {span!r} is no span; expected start, end and label", code="bad-span")
    if not isinstance(span[2], str) or not span[2].strip():
        raise InputError(f"{location}: the span {span!r} has no label", code="bad-span")
    if len(span) > 3 and isinstance(span[3], str):
        require_same_text(text[span[0] : span[1]], span[3], location)
    return Span(span[0], span[1], span[2].strip())


def _label_studio(record: dict[str, Any], location: str, notes: Notes) -> tuple[str, list[Span]] | None:
    """Read the first annotation of a Label Studio export that was not cancelled; None without one."""
    annotations = [annotation for annotation in record["annotations"] if not annotation.get("was_cancelled")]
    if not annotations:
        return None
    notes["further annotations of a text, of which the first is read"] += len(annotations) - 1
    texts = [value for value in record["data"].values() if isinstance(value, str)]
    text = record["data"].get("text", texts[0] if texts else None)
    if not isinstance(text, str):
        raise InputError(f"{location}: no text in `data`", code="missing-field")
    spans = []
    for result in annotations[0]["result"]:
        if result.get("type") == "labels":
            notes["further labels of a span, of which the first is read"] += len(result["value"]["labels"]) - 1
            spans.append(_span(result["value"], text, location))
        else:
            notes[f"results of the type {result.get('type')}, left out"] += 1
    return text, spans
