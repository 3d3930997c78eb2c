"""Tables of what a study's trials were made with, and of every single score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from studies.differences import Record


def made_rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """List commit, versions and hardware of the trials, with the number of trials that each line holds for."""
    lines: Counter[tuple[tuple[str, str], ...]] = Counter()
    hours: Counter[tuple[tuple[str, str], ...]] = Counter()
    for record in records:
        made = record.get("made") or {"software": {}, "hardware": "unknown", "hours": 0.0}
        kept = {key: str(text) for key, text in made["software"].items() if key != "code"}
        key = tuple({"hardware": made["hardware"], **kept}.items())
        lines[key] += 1
        hours[key] += made["hours"]
    return [{"trials": str(count), "hours": f"{hours[key]:.2f}", **dict(key)} for key, count in lines.items()]


def score_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """List each score of each trial: one row per measure and seed, in the order of the study's seeds."""
    rows = [
        {"trial": record["trial"], "measure": measure, "number": number, "score": score}
        for record in records
        for measure, scores in record["scores"].items()
        for number, score in enumerate(scores)
    ]
    losses = [
        {"trial": record["trial"], "measure": record["loss_of"], "number": 0, "score": record["loss"]}
        for record in records
    ]
    return losses + rows
