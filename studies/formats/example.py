"""The labelled example that every format is read into."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

Notes = Counter[str]
"""Count of each thing that a reader changed or left out, by its description."""


@dataclass(frozen=True)
class Example:
    """One labelled text."""

    location: str
    """File and line, for messages."""
    text: str
    pair: str | None
    """Second text of a sentence pair."""
    words: tuple[str, ...]
    """Words of a token classification, which are joined by spaces in `text`; each has one label."""
    labels: tuple[str, ...]
    """BIO tags of the words, the classes of a text, or the number of a regression as text."""
