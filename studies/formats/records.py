"""Examples of records: texts with classes or a number, words with tags, and texts with entities in characters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from datapipe.where import NoFieldError, field
from studies.formats.conll import require_same_text
from studies.formats.example import Example, Notes
from studies.formats.files import read_records
from studies.formats.labels import are_indicators, bits_of, labels_of, list_of_labels, name_of
from studies.formats.tags import Span, example_of_spans, to_bio
from studies.tasks import Task

WORDS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "ner", "labels", "label")
SPANS = ("spans", "entities", "labels", "label")
"""Names of the columns of `tokens` tasks, in the order in which they are looked for. `columns` names others."""
_LISTED = 20
"""Most keys of a record that a message lists."""


def read_texts(path: Path, task: Task) -> Iterator[Example]:
    """Yield the examples of a `single`, `multi` or `regression` task.

    Raises:
        InputError: A column is missing, or a value is no label.
    """
    columns = task.columns
    assert columns is not None
    texts: list[tuple[str, str | None]] = []
    labels: list[tuple[str, Any]] = []
    for location, record in read_records(path, [*columns.text, *columns.pair, columns.label]):
        text, pair = (
            " ".join(_text(_value(record, key, location), key, location) for key in keys) if keys else None
            for keys in (columns.text, columns.pair)
        )
        texts.append((text or "", pair))
        label = _value(record, columns.label, location)
        labels.append((location, list_of_labels(label, task, location) if task.kind == "multi" else label))
    state_each = task.kind == "multi" and are_indicators(labels, task.names)
    for (text, pair), (location, label) in zip(texts, labels, strict=True):
        if state_each:
            named = tuple(name for name, bit in zip(task.names, bits_of(label, task.names) or (), strict=False) if bit)
        else:
            named = labels_of(label, task, location)
        yield Example(location, text, pair, (), named)


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
        text = words if isinstance(words, str) else _first(record, ("text",))
        if task.columns and not isinstance(words, list):
            words = _first(record, WORDS)  # the tokens of Prodigy, beside a text that `columns` names
            words = words if _is_list_of(words, dict) else None
        tags = _first(record, (task.columns.label,) if task.columns else TAGS)
        if words == [] and not tags and "text" not in record:
            notes["records without words, left out"] += 1
            continue
        if _is_list_of(words, str) and isinstance(tags, list) and len(words) == len(tags) and not _are_spans(tags):
            named = [name_of(tag, task, location) for tag in tags]
            bio = to_bio(named, task.types, location, notes)
            yield Example(location, " ".join(words), None, tuple(words), bio)
            continue
        spans = _first(record, (task.columns.label,) if task.columns else SPANS)
        if spans is None and "answer" in record:
            spans = []  # Prodigy leaves the key out of an accepted text without entities
        if not isinstance(text, str) or not isinstance(spans, list):
            raise InputError(
                f"{location}: expected words and as many tags ({', '.join(WORDS)}; {', '.join(TAGS)}), or a text and "
                f"a list of spans ({', '.join(SPANS)}); it has {_keys(record)}. `columns` names other columns",
                code="missing-field",
            )
        places = [_place(word, location) for word in words] if _is_list_of(words, dict) else None
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


def _first(record: dict[str, Any], names: Sequence[str]) -> Any:
    """Return the first column that a record has, also inside an object as in `data.text`; None without one."""
    for name in names:
        if name in record:
            return record[name]
        if "." in name:
            try:
                return field(record, name)
            except NoFieldError:
                continue
    return None


def _keys(record: dict[str, Any]) -> str:
    more = f" and {len(record) - _LISTED:,} more" if len(record) > _LISTED else ""
    return ", ".join(list(record)[:_LISTED]) + more


def _place(word: dict[str, Any], location: str) -> tuple[int, int]:
    """Return start and end of a token of Prodigy."""
    start, end = word.get("start"), word.get("end")
    if not isinstance(start, int) or not isinstance(end, int):
        raise InputError(f"{location}: the token {word!r} has no start and end in characters", code="bad-span")
    return start, end


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
    annotations = record["annotations"]
    if not isinstance(annotations, list) or not all(isinstance(annotation, dict) for annotation in annotations):
        raise InputError(
            f"{location}: `annotations` is no list of objects; export from Label Studio as JSON", code="missing-field"
        )
    annotations = [annotation for annotation in annotations if not annotation.get("was_cancelled")]
    if not annotations:
        return None
    notes["further annotations of a text, of which the first is read"] += len(annotations) - 1
    texts = [value for value in record["data"].values() if isinstance(value, str)]
    text = record["data"].get("text", texts[0] if texts else None)
    if not isinstance(text, str):
        raise InputError(f"{location}: no text in `data`", code="missing-field")
    results = annotations[0].get("result")
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise InputError(f"{location}: the annotation has no list `result`", code="missing-field")
    spans = []
    for result in results:
        if result.get("type") == "labels":
            value = result.get("value")
            labels = value.get("labels") if isinstance(value, dict) else None
            if not isinstance(labels, list) or not labels:
                raise InputError(f"{location}: a result of the type labels has no labels", code="bad-span")
            notes["further labels of a span, of which the first is read"] += len(labels) - 1
            spans.append(_span(value, text, location))
        else:
            notes[f"results of the type {result.get('type')}, left out"] += 1
    return text, spans
