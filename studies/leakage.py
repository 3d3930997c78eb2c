"""Leakage: which test examples of a task were already in the training text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from datapipe.text import find_files, read_texts
from studies.tasks import Example

WORDS = 13
"""Words in a row that must agree, as in Brown et al. 2020 (GPT-3), appendix C; a shorter example must occur whole."""
_WORD = re.compile(r"\w+")


def leakage(examples: Sequence[Example], training_text: Sequence[str]) -> dict[str, Any]:
    """Count the examples that share a run of 13 words with the training text, case and punctuation aside.

    Text of fewer than 13 words must occur whole; below 4 words it says nothing and counts as not found.
    """
    owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, example in enumerate(examples):
        words = _WORD.findall(f"{example.text} {example.pair or ''}".lower())
        size = min(WORDS, len(words))
        for start in range(len(words) - size + 1 if size >= 4 else 0):
            owners[tuple(words[start : start + size])].add(number)
    sizes = sorted({len(run) for run in owners})
    found: set[int] = set()
    documents = 0
    for reference in training_text:
        for path in find_files(reference):
            for text in read_texts(path):
                documents += 1
                words = _WORD.findall(text.text.decode("utf-8", "replace").lower())
                for size in sizes:
                    for start in range(len(words) - size + 1):
                        found |= owners.get(tuple(words[start : start + size]), set())
    return {
        "examples": len(examples),
        "found": len(found),
        "share": len(found) / len(examples),
        "training_documents": documents,
        "where": [examples[number].where for number in sorted(found)][:20],
    }
