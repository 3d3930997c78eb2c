"""CoNLL columns and brat folders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from configs.errors import InputError
from studies.formats.example import Example, Notes
from studies.formats.files import read_text
from studies.formats.tags import Span, example_of_spans, is_tag, to_bio
from studies.tasks import Task

_HEADER = re.compile(r"(ner|bio|iob)?[-_ ]?(labels?|tags?)|ner|bio|iob", re.IGNORECASE)
_WORD = re.compile(r"words?|tokens?|form", re.IGNORECASE)
_SPACE = re.compile(r"[ \t]+")
"""Separator of columns. Other white space, such as a no-break space, is part of a word."""


def read_conll(path: Path, task: Task, notes: Notes) -> Iterator[Example]:
    """Yield the sentences of a file with a word per line: the word first, its tag last.

    Columns are separated by tabs or spaces. Lines of comments (`# ...`), `-DOCSTART-` and a header are skipped. A line
    that begins with # is a word if it has as many columns as most lines and ends in a tag.

    Raises:
        InputError: A line has no tag, or the words are numbers of words.
    """
    words: list[str] = []
    tags: list[str] = []
    first_line = 1
    lines = [_columns(line) for line in read_text(path).split("\n")]
    widths = Counter(len(columns) for columns in lines if columns and not columns[0].startswith(("#", "-DOCSTART-")))
    width = widths.most_common(1)[0][0] if widths else 2
    has_header = bool(lines[0]) and _HEADER.fullmatch(lines[0][-1]) is not None
    named = next((number for number, name in enumerate(lines[0]) if _WORD.fullmatch(name)), 0)
    if named and has_header:
        raise InputError(
            f"{path}, line 1: the header names column {named + 1} the {lines[0][named]}; write the word into the first "
            "column and its tag into the last, and an empty line after each sentence",
            code="word-not-first",
        )
    firsts = [columns[0] for columns in lines[has_header:] if columns]
    only_numbers = len(firsts) > 1 and all(first.isdecimal() for first in firsts)  # such as those of sentences
    for number, columns in enumerate([*lines, []], 1):
        if not columns or columns[0] == "-DOCSTART-":
            if words:
                counted = len(words) > 1 and words == [str(place) for place in range(1, len(words) + 1)]
                if width > 2 and (counted or only_numbers):
                    raise InputError(
                        f"{path}, line {first_line}: the first column numbers the words or sentences; write the word "
                        "into the first column and its tag into the last",
                        code="words-are-numbers",
                    )
                bio = to_bio(tags, task.types, f"{path}, line {first_line}", notes)
                yield Example(f"{path}, line {first_line}", " ".join(words), None, tuple(words), bio)
            words, tags, first_line = [], [], number + 1
            continue
        is_known = is_tag(columns[-1]) or columns[-1] in task.types
        is_comment = columns[0].startswith("#") and (not is_known or len(columns) != width)
        if is_comment or (not is_known and number == 1 and _HEADER.fullmatch(columns[-1])):
            notes["lines that begin with # and end in a tag, left out as comments"] += is_comment and is_known
            first_line += not words
            continue
        if len(columns) < 2 or not columns[0]:
            got = " ".join(columns)
            raise InputError(f"{path}, line {number}: expected a word and its tag, got {got!r}", code="bad-token-line")
        notes["lines with another number of columns, of which the first and the last are read"] += len(columns) != width
        if not is_known:
            to_bio(columns[-1:], task.types, f"{path}, line {number}", notes)
        if any("-" in column and is_tag(column) for column in columns[1:-1]):
            notes["lines with another column of tags, of which the last is read"] += 1
        words.append(columns[0])
        tags.append(columns[-1])


def _columns(line: str) -> list[str]:
    """Split a line at tabs, or at spaces if it has no tab; empty for a blank line."""
    line = line.rstrip(" \t\r")
    if not line.strip(" \t"):
        return []
    return [column.strip(" ") for column in line.split("\t")] if "\t" in line else _SPACE.split(line.lstrip(" "))


def read_brat(folder: Path, task: Task, notes: Notes) -> Iterator[Example]:
    """Yield the lines of the documents of a brat folder; lines that an entity joins are one example.

    Discontinuous entities are left out and counted, because BIO tags cannot state them.

    Raises:
        InputError: An annotation is wrong or its text is missing.
    """
    for path in folder.rglob("*.txt"):
        notes["texts without an .ann file beside them, left out"] += not path.with_suffix(".ann").is_file()
    for path in sorted(folder.rglob("*.ann")):
        source = path.with_suffix(".txt")
        if not source.is_file():
            raise InputError(f"{path}: no text {source} beside it", code="file-missing")
        text = read_text(source)
        spans = list(_spans(path, text, notes))
        start = 0
        for end in [*(match.start() for match in re.finditer("\n", text)), len(text)]:
            if any(span.start < end < span.end for span in spans):
                continue
            inside = [
                Span(span.start - start, span.end - start, span.type) for span in spans if start <= span.start < end
            ]
            if text[start:end].strip():
                line = text.count("\n", 0, start) + 1
                yield example_of_spans(text[start:end], inside, task.types, f"{source}, line {line}", notes)
            start = end + 1


def _spans(path: Path, text: str, notes: Notes) -> Iterator[Span]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.startswith("T"):
            continue
        location = f"{path}, line {number}"
        match = re.fullmatch(r"T\S*\t(\S+) (\d+ \d+(?:;\d+ \d+)*)\t(.*)", line.rstrip("\r"))
        if match is None:
            raise InputError(f"{location}: expected `T1<tab>Type START END<tab>text`, got {line!r}", code="bad-span")
        parts = [tuple(map(int, part.split())) for part in match[2].split(";")]
        said = " ".join(text[start:end] for start, end in parts)
        require_same_text(said, match[3], location)
        joined = text[parts[0][0] : parts[-1][1]]
        if len(parts) > 1 and joined.split() != said.split():
            notes["discontinuous entities, left out"] += 1
            continue
        yield Span(parts[0][0], parts[-1][1], match[1])


def require_same_text(found: str, said: str, location: str) -> None:
    """Require that the characters of an entity are the words that its annotation states.

    Raises:
        InputError: They differ, so the offsets count something else, such as bytes.
    """
    if found.split() != said.split():
        raise InputError(
            f"{location}: the entity's text is {said!r}, but its offsets give {found!r}; offsets count "
            "characters and not bytes, from 0, and the line end CR LF as two",
            code="bad-span",
        )
