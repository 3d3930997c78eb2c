"""Leakage: test examples of a task that also occur in the training text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from datapipe.inputs import find_files
from datapipe.text import read_texts
from studies.examples import Example

WORDS = 13
"""Consecutive words that must agree, as in Brown et al. 2020 (GPT-3), appendix C."""
FEWEST_WORDS = 4
"""Words below which an example is too short to be counted as leaked."""
LISTED = 20
"""Leaked examples that the result names."""
_WORD = re.compile(r"\w+")


def leakage(examples: Sequence[Example], training_text: Sequence[str]) -> dict[str, Any]:
    """Count the examples that share 13 consecutive words with the training text.

    Case and punctuation are ignored. An example of 4 to 12 words is leaked if it occurs as a whole.

    Args:
        examples: Test examples of a task.
        training_text: Text files, folders or `package://` references.
    """
    owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, example in enumerate(examples):
        words = _words(f"{example.text} {example.pair or ''}")
        if len(words) >= FEWEST_WORDS:
            for ngram in _ngrams(words, min(WORDS, len(words))):
                owners[ngram].add(number)
    sizes = sorted({len(ngram) for ngram in owners})
    leaked: set[int] = set()
    documents = 0
    for reference in training_text:
        for path in find_files(reference):
            for text in read_texts(path):
                documents += 1
                words = _words(text.text.decode("utf-8", "replace"))
                for size in sizes:
                    for ngram in _ngrams(words, size):
                        leaked |= owners.get(ngram, set())
    return {
        "examples": len(examples),
        "found": len(leaked),
        "share": len(leaked) / len(examples),
        "training_documents": documents,
        "where": [examples[number].location for number in sorted(leaked)][:LISTED],
    }


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1))
