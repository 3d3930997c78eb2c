"""Examples of records: texts with classes or a number, words with tags, and texts with entities in characters."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
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
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
_COMMA = re.compile(r"[-+]?\d+,\d+")
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PYTHON_LIST = re.compile(rf"\[\s*{_QUOTED}(?:\s*,\s*{_QUOTED})*\s*,?\s*\]", re.DOTALL)
_LISTED = 20
"""Most keys of a record that a message lists."""
_MISSING = ("nan", "na", "n/a", "none", "null", "<na>", "nat")
"""How R, pandas, SQL and Python write a missing value, in lower case."""


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
        labels.append((location, _list_of_labels(label, task, location) if task.kind == "multi" else label))
    are_indicators = task.kind == "multi" and _are_indicators(labels, task.names)
    for (text, pair), (location, label) in zip(texts, labels, strict=True):
        if are_indicators:
            named = tuple(name for name, bit in zip(task.names, _bits(label, task.names) or (), strict=False) if bit)
        else:
            named = _labels(label, task, location)
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
            named = [_name(tag, task, location) for tag in tags]
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


def _labels(value: Any, task: Task, location: str) -> tuple[str, ...]:
    """Read the classes or the number of one example."""
    if task.kind == "regression":
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            has_comma = isinstance(value, str) and _COMMA.fullmatch(value.strip())
            hint = "; write its decimal comma as a point" if has_comma else _UNLABELLED
            raise InputError(f"{location}: the label {value!r} is no number{hint}", code="bad-label")
        return (repr(number),)
    if not isinstance(value, list):
        value = [value]
    if task.kind == "single" and len(value) != 1:
        raise InputError(
            f"{location}: {len(value)} labels where kind single has one; set kind: multi", code="bad-label"
        )
    return tuple(dict.fromkeys(_name(label, task, location) for label in value))


def _list_of_labels(value: Any, task: Task, location: str) -> list[Any]:
    """Read the labels of a `multi` example: a list, also as JSON or as pandas writes it, or one string."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    if not value.strip().startswith("["):
        return [part for part in value.split(task.separator) if part.strip()]
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = ast.literal_eval(value.strip()) if _PYTHON_LIST.fullmatch(value.strip()) else None
    if not isinstance(found, list):
        raise InputError(
            f"{location}: the label {value!r} is no list in JSON or Python; give the labels with the separator "
            f"{task.separator!r}",
            code="bad-label",
        )
    return found


def _are_indicators(labels: Sequence[tuple[str, list[Any]]], names: Sequence[str]) -> bool:
    """Return whether the lists of a file state 0 or 1 for each class, and not ids or names.

    Of a list such as [0, 1] alone nobody can tell, so the file decides: all its lists are so, or none may look so.

    Args:
        labels: Location and list of each example.
        names: The task's `names`.

    Raises:
        InputError: The classes have no names, or only some lists state 0 or 1 for each of them.
    """
    looks_so = [(location, value) for location, value in labels if _states_each_class(value, names)]
    if not names:
        lengths = {len(value) for _, value in labels}
        if len(lengths) == 1 and max(lengths) > 1 and all(_bits(value, names) for _, value in labels):
            looks_so = list(labels)
        if looks_so:
            location, value = looks_so[0]
            raise InputError(
                f"{location}: {value} states 0 or 1 for each of {len(value)} classes; give these classes in the "
                "task's `names`",
                key="names",
                code="indicators-without-names",
            )
    if not looks_so:
        return False
    for location, value in labels:
        has_no_label = not value and len(names) > 2  # fewer names leave it open what the other lists are
        if not has_no_label and (len(value) != len(names) or _bits(value, names) is None):
            raise InputError(
                f"{location}: the label {value} does not state 0 or 1 for each of the {len(names)} `names`, as "
                f"{looks_so[0][1]} ({looks_so[0][0]}) seems to; give one name per class, or write the names of the "
                "labels instead of numbers",
                key="names",
                code="bad-label",
            )
    return True


def _states_each_class(value: list[Any], names: Sequence[str]) -> bool:
    """Return whether a list looks like 0 or 1 per class. Ids of classes differ from each other and are no floats."""
    bits = _bits(value, names)
    if not bits:
        return False
    is_no_ids = len(set(bits)) < len(bits) or not all(isinstance(part, str) or type(part) is int for part in value)
    return is_no_ids or len(bits) == len(names)


def _bits(value: list[Any], names: Sequence[str]) -> list[int] | None:
    """Return a list of 0 and 1 as integers; None for any other list. What `names` lists is a name."""
    parts = [part.strip() if isinstance(part, str) else part for part in value]
    is_bits = all(part in (0, 1, "0", "1") and part not in names for part in parts)
    return [int(part) for part in parts] if is_bits else None


@lru_cache
def _have_ids(names: tuple[str, ...]) -> bool:
    """Return whether a number can be an id: no name is a number other than its own id."""
    return all(float(name) == number for number, name in enumerate(names) if _NUMBER.fullmatch(name))


def _name(label: Any, task: Task, location: str) -> str:
    """Return the name of a class, or a tag. What `names` lists is a class, whatever it looks like."""
    if isinstance(label, str) and label.strip() in task.names:
        return label.strip()
    written = label
    if isinstance(label, str) and task.names and task.kind != "tokens" and _ID.fullmatch(label.strip()):
        label = float(label)  # a table's ids are strings
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool):
        if task.names and not _have_ids(task.names):
            if str(label) in task.names:
                return str(label)
            raise InputError(
                f"{location}: the label {written} is none of the task's `names`; these are numbers themselves, so it "
                "is not read as an id; list it in `names`, or give names that are no numbers",
                key="names",
                code="bad-label",
            )
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
