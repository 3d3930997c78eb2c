"""Identifiers in a text, such as names and dates: spans that come with it, and matches of patterns.

Their tokens are marked. A marked token is read as every other token, but it is never a label. Messages do not repeat
what stands in a span, because logs are read by more people than notes.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Reading

SPANS = "spans"
"""Column that holds the spans of a text, unless `Reading.spans` names another."""
NO_SPANS = "none"
"""Value of `Reading.spans` by which spans are not read."""
UNLABELLED = "ID"
"""Label of an identifier that has no other."""
LABEL_KEYS = ("label", "entity_type", "entity_group", "entity")
"""Keys of the label in spans that are objects: Prodigy and spaCy, Presidio, pipelines of transformers."""
_LABEL = re.compile(r"[\w-]+")


class Identifier(NamedTuple):
    """A span of a text."""

    start: int
    """First character, a Unicode code point."""
    end: int
    """Character after the last one."""
    label: str


Patterns = Sequence[tuple[str, re.Pattern[str]]]
"""(label, regular expression) each."""


def parse_spans(value: Any, text: str) -> list[Identifier]:
    """Check the spans of a text.

    Args:
        value: `[[start, end, label], ...]`, objects with these keys, the JSON of either, or None.
        text: The text. A span that has its own `text` must stand there, because some tools count UTF-16 units or bytes.

    Raises:
        ValueError: It is no such list, or a span does not lie within the text, or other words stand there.
    """
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"a {type(value).__name__} is no list [[start, end, label], ...]")
    identifiers = []
    for number, span in enumerate(value, 1):
        if isinstance(span, dict):
            named = next((span[key] for key in LABEL_KEYS if span.get(key) is not None), None)
            parts: list[Any] = [span.get("start"), span.get("end"), named]
        else:
            parts = [*span, None] if isinstance(span, list) and len(span) == 2 else span
        if not isinstance(parts, list) or len(parts) != 3:
            raise ValueError(f"span {number} is a {type(span).__name__} and not [start, end, label]")
        start, end, label = parts
        if label is not None and not isinstance(label, str):
            raise ValueError(f"span {number}: its label is a {type(label).__name__} and not a string")
        found = _checked(f"span {number}", start, end, label, len(text))
        words = span.get("text") if isinstance(span, dict) else None
        if isinstance(words, str) and words.split() != text[start:end].split():
            raise ValueError(
                f"span {number}: its words do not stand at [{start}, {end}]; count characters (Unicode code points), "
                "not bytes or UTF-16 units"
            )
        identifiers.append(found)
    return identifiers


def parse_brat(annotations: str, text: str) -> list[Identifier]:
    """Read the text-bound annotations of a brat .ann file.

    Offsets count a line break of CR and LF as two characters, or all as one, because many tools read it as one.

    Raises:
        ValueError: A line is none of brat's, or its words do not stand in the text at its offsets.
    """
    try:
        return _parse_brat(annotations, text)
    except ValueError as error:
        breaks = [match.start() - number for number, match in enumerate(re.finditer("\r\n", text))]
        try:
            found = _parse_brat(annotations, text.replace("\r\n", "\n")) if breaks else []
        except ValueError:
            found = []
        if not found:
            raise error from None
        return [
            Identifier(start + bisect_left(breaks, start), end + bisect_left(breaks, end), label)
            for start, end, label in found
        ]


def _parse_brat(annotations: str, text: str) -> list[Identifier]:
    identifiers = []
    for number, line in enumerate(annotations.split("\n"), 1):
        if not line.startswith("T"):
            continue
        place = f"line {number} of its .ann file"
        try:
            _, described, *words = line.rstrip("\r").split("\t")
            label, places = described.split(" ", 1)
            fragments = [[int(offset) for offset in fragment.split()] for fragment in places.split(";")]
            found = [_checked(place, start, end, label, len(text)) for start, end in fragments]
        except ValueError as error:
            if str(error).startswith(place):
                raise
            raise ValueError(f"{place} is not `T1<TAB>LABEL start end<TAB>words`") from None
        covered = " ".join(text[one.start : one.end] for one in found)
        if words and "".join(words[0].split()) != "".join(covered.split()):
            raise ValueError(f"{place}: its words do not stand at {places} in the text; it is of another version")
        identifiers += found
    return identifiers


def _checked(place: str, start: Any, end: Any, label: str | None, length: int) -> Identifier:
    if type(start) is not int or type(end) is not int:
        kinds = f"{type(start).__name__} and {type(end).__name__}"
        raise ValueError(f"{place}: start and end are {kinds}, not whole numbers of characters")
    if not 0 <= start < end <= length:
        raise ValueError(f"{place}: [{start}, {end}] is no part of a text of {length:,} characters")
    return Identifier(start, end, " ".join((label or "").split()) or UNLABELLED)


def load_patterns(path: str) -> Patterns:
    """Read a file of regular expressions: one per line, or `LABEL<TAB>EXPRESSION`; `#` begins a comment line.

    Raises:
        InputError: The file cannot be read, or a line is no expression; the message names it.
    """
    patterns = []
    content = _content(path)
    spaces = " +" if "\t" in content else "  +"  # one space may belong to an expression
    for number, line in enumerate(content.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("#"):
            continue
        label, tab, expression = line.partition("\t")
        if not tab:
            label, expression = UNLABELLED, line
        fault = None if _LABEL.fullmatch(label) else f"{label!r} is no label; write a tab in an expression as \\t"
        if not tab and re.match(rf"[A-Z][A-Z0-9_-]+{spaces}\S", line):
            fault = "a tab stands between a label and its expression; in an expression write a space as [ ]"
        try:
            pattern = re.compile(expression)
            if pattern.search("") or not expression:
                fault = fault or "it matches the empty text"
        except (re.error, RecursionError, OverflowError) as error:
            fault = fault or f"no regular expression ({error})"
        if fault:
            raise InputError(f"{path}, line {number}: {fault}", key="--identifiers", code="pattern-invalid")
        patterns.append((label, pattern))
    if not patterns:
        raise InputError(f"{path} holds no regular expression", key="--identifiers", code="pattern-invalid")
    return patterns


def _content(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path} cannot be read: {reason}", key="--identifiers", code="not-readable") from None


def find_identifiers(patterns: Patterns, text: str) -> list[Identifier]:
    """The matches of all patterns that are not empty."""
    found = ((*match.span(), label) for label, pattern in patterns for match in pattern.finditer(text))
    return [Identifier(start, end, label) for start, end, label in found if start < end]


def merge_overlapping(identifiers: Iterable[Identifier]) -> tuple[Identifier, ...]:
    """The identifiers in order; those that overlap become one, with the label of the first and longest."""
    merged: list[Identifier] = []
    for one in sorted(identifiers, key=lambda one: (one.start, -one.end)):
        if merged and one.start < merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(merged[-1].end, one.end))
        else:
            merged.append(one)
    return tuple(merged)


def with_placeholders(text: str, identifiers: Sequence[Identifier]) -> tuple[str, tuple[Identifier, ...]]:
    """Replace merged identifiers by their labels in brackets, such as `[NAME]`; returns the places of these too."""
    parts: list[str] = []
    places: list[Identifier] = []
    length = read = 0
    for start, end, label in identifiers:
        placeholder = f"[{label}]"
        parts += [text[read:start], placeholder]
        length += start - read
        places.append(Identifier(length, length + len(placeholder), label))
        length, read = length + len(placeholder), end
    return "".join([*parts, text[read:]]), tuple(places)


def overlaps(offsets: NDArray[np.int64], start: int, end: int, identifiers: Sequence[Identifier]) -> NDArray[np.bool_]:
    """Tell which tokens overlap an identifier by any character.

    A character that no token covers counts for the tokens on both sides, because normalizers drop some characters
    (an accent that is a character of its own), and some tokenizers leave spaces out of the offsets.

    Args:
        offsets: `[tokens, 2]`, first character of each token and the one after its last.
        start: First character of the part of the text that was tokenized.
        end: Character after that part.
        identifiers: Merged identifiers of the text.

    Returns:
        `[tokens]`
    """
    if not len(offsets) or not identifiers:
        return np.zeros(len(offsets), bool)
    starts, ends = offsets.T
    starts = np.minimum(starts, np.append(start, ends[:-1]))
    ends = np.maximum(ends, np.append(offsets[1:, 0], end))
    places = np.array([(start, end) for start, end, _ in identifiers], np.int64)
    before = np.searchsorted(places[:, 0], ends)  # identifiers that begin before the token's end; the last ends last
    result: NDArray[np.bool_] = (before > 0) & (places[np.maximum(before, 1) - 1, 1] > starts)
    return result


def with_marks(ids: NDArray[np.int32], marked: NDArray[np.bool_] | None) -> NDArray[np.int32]:
    """Write marked ids as their complement `~id`, so that a mark goes wherever its token goes."""
    return ids if marked is None else np.where(marked, ~ids, ids)


def split_marks(ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None]:
    """The inverse of `with_marks`; None if no token is marked."""
    marked = ids < 0
    return (np.where(marked, ~ids, ids), marked) if marked.any() else (ids, None)


def policy(reading: Reading) -> dict[str, str | bool]:
    """Describe what `reading` asks for beyond the spans of the text, as a manifest records it.

    Raises:
        InputError: The file of patterns cannot be read.
    """
    asked: dict[str, str | bool] = {"mask_spans": True} if reading.mask_spans else {}
    if reading.identifiers:
        asked["patterns_sha256"] = hashlib.sha256(_content(reading.identifiers).encode()).hexdigest()
    return asked
