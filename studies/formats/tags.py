"""Entity tags: other schemes turned into BIO, and character spans turned into tags of words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from configs.errors import InputError
from studies.formats.example import Example, Notes

_TAG = re.compile(r"([BIESLU])(?:[-_](\S.*))?")
_SEVERAL = re.compile(r"[BIESLU]-[^,|;+]+[,|;+][BIESLUO](-.*)?")
_WORD = re.compile(r"\w+|[^\w\s]")
_WITHIN = ("Mn", "Mc", "Me", "Cf")
"""Unicode categories of characters that do not end a word."""
_OPENS = "BSU"
"""Prefixes that begin an entity in every scheme."""


class Span(NamedTuple):
    """An entity of a text, in characters."""

    start: int
    end: int
    """First character after the entity."""
    type: str


def is_tag(tag: str) -> bool:
    """Return whether a word of a file is a tag of BIO, IOB1, IO, BIOES or BILOU."""
    return tag == "O" or _TAG.fullmatch(tag) is not None


def to_bio(tags: Sequence[str], types: Sequence[str], location: str, notes: Notes) -> tuple[str, ...]:
    """Turn the tags of one sentence into BIO.

    An entity begins at B, S or U, and at any tag that does not continue the entity before it. So one rule reads BIO,
    IOB1, IO, BIOES and BILOU.

    Args:
        tags: Tags of any of these schemes; without a prefix only if `types` names them.
        types: Entity types that are kept; all if empty.
        location: File and line, for messages.
        notes: Receives the beginnings without B, and the tags of other types.

    Raises:
        InputError: A word is no tag.
    """
    result: list[str] = []
    before: str | None = None
    for tag in tags:
        if tag == "O":
            result.append("O")
            before = None
            continue
        prefix, type_ = _parts(tag, types, location)
        if types and type_ not in types:
            notes["words of other types than the task's, read as O"] += 1
            result.append("O")
            before = None
            continue
        begins = prefix in _OPENS or type_ != before
        if begins and prefix not in _OPENS:
            notes["entities that begin without B, S or U, as in IOB1 and IO"] += 1
        result.append(_tag("B" if begins else "I", type_))
        before = None if prefix in ("E", "L", "S", "U") else type_
    return tuple(result)


def example_of_spans(
    text: str,
    spans: Sequence[Span],
    types: Sequence[str],
    location: str,
    notes: Notes,
    words: Sequence[tuple[int, int]] | None = None,
) -> Example:
    """Build an example of a text with entities in characters.

    Of overlapping entities the longest is kept. An entity that ends inside a word is extended to the whole word.

    Args:
        text: The text.
        spans: Its entities.
        types: Entity types that are kept; all if empty.
        location: File and line, for messages.
        notes: Receives what was left out or moved.
        words: Start and end of each word; default: those of `_words`.

    Raises:
        InputError: A span lies outside the text or covers no word.
    """
    places = list(words) if words is not None else _words(text)
    tags = ["O"] * len(places)
    for span in sorted(set(spans), key=lambda span: (span.start - span.end, span.start, span.type)):
        if types and span.type not in types:
            notes["entities of other types than the task's, left out"] += 1
            continue
        covered = [index for index, (start, end) in enumerate(places) if start < span.end and end > span.start]
        if not (0 <= span.start < span.end <= len(text) and covered and span.type):
            raise InputError(
                f"{location}: the entity {span.type!r} from {span.start} to {span.end} covers no word of a text of "
                f"{len(text):,} characters",
                code="bad-span",
            )
        if any(tags[index] != "O" for index in covered):
            notes["nested or overlapping entities, of which the longest is kept"] += 1
            continue
        if (places[covered[0]][0], places[covered[-1]][1]) != (span.start, span.end) and text[
            span.start : span.end
        ].strip() != text[places[covered[0]][0] : places[covered[-1]][1]]:
            notes["entities that end inside a word, extended to the whole word"] += 1
        for index in covered:
            tags[index] = _tag("I", span.type)
        tags[covered[0]] = _tag("B", span.type)
    named = tuple(text[start:end] for start, end in places)
    return Example(location, " ".join(named), None, named, tuple(tags))


def _words(text: str) -> list[tuple[int, int]]:
    """Find the words of a text: runs of letters and digits, and single other characters.

    Combining marks and invisible characters, such as accents of their own and soft hyphens, belong to the word that
    they follow.
    """
    places: list[tuple[int, int]] = []
    is_open = False
    for start, end in (match.span() for match in _WORD.finditer(text)):
        follows = bool(places) and places[-1][1] == start
        is_mark = unicodedata.category(text[start]) in _WITHIN
        if follows and (is_mark or (is_open and _is_letter(text[start]))):
            places[-1] = places[-1][0], end
            is_open = is_mark and _is_letter(text[places[-1][0]])
        else:
            places.append((start, end))
            is_open = False
    return places


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "_"


def _parts(tag: str, types: Sequence[str], location: str) -> tuple[str, str]:
    """Split a tag into prefix and type."""
    if tag in types:
        return "I", tag
    if _SEVERAL.fullmatch(tag):
        raise InputError(
            f"{location}: {tag!r} is several tags; a word has one, so keep the tag of the longest entity",
            code="bad-tag",
        )
    match = _TAG.fullmatch(tag)
    if match is None:
        raise InputError(
            f"{location}: {tag!r} is no tag; expected O, B-TYPE, I-TYPE, or the tags of BIOES or BILOU. If the tags "
            "are bare types, name them in the task's `types`",
            code="bad-tag",
        )
    return match[1], match[2] or ""


def _tag(prefix: str, type_: str) -> str:
    return f"{prefix}-{type_}" if type_ else prefix
