"""Arms of a study compared in pairs: the same data, the same seed, one thing changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from studies.scores import Interval, bootstrap_interval, mean_interval

Record = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """Of one arm from the baseline in one measure, over all points of the grid."""

    arm: str
    baseline: str
    measure: str
    """`loss` (in nats, lower is better) or a task (0..1, higher is better)."""
    pairs: tuple[float, ...]
    """arm - baseline at each point."""
    bootstrap: Interval
    students: Interval
    verdict: str


def differences(records: Sequence[Record], baseline: str) -> list[Difference]:
    """Every arm against the baseline, in the loss and every task."""
    arms = list(dict.fromkeys(record["arm"] for record in records))
    by_place = {(record["arm"], str(record["point"])): record for record in records}
    points = list(dict.fromkeys(str(record["point"]) for record in records))
    found = []
    for arm in arms:
        if arm == baseline:
            continue
        for measure in measures(records):
            pairs = tuple(
                value(by_place[arm, point], measure) - value(by_place[baseline, point], measure) for point in points
            )
            students = mean_interval(pairs)
            verdict = _verdict(arm, baseline, measure, students, len(pairs))
            found.append(Difference(arm, baseline, measure, pairs, bootstrap_interval(pairs), students, verdict))
    return found


def measures(records: Sequence[Record]) -> list[str]:
    return ["loss", *dict.fromkeys(task for record in records for task in record["scores"])]


def value(record: Record, measure: str) -> float:
    """The loss, or a task's score averaged over its fine-tuning seeds."""
    return record["loss"] if measure == "loss" else fmean(record["scores"][measure])


def _verdict(arm: str, baseline: str, measure: str, interval: Interval, pairs: int) -> str:
    """By Student's interval: with few pairs the bootstrap's is too narrow (it cannot leave the values it has seen)."""
    if not math.isfinite(interval.low):
        return f"no verdict: {pairs} pair says nothing of the spread"
    if interval.low <= 0 <= interval.high:
        return "no difference shown"
    better = (interval.mean < 0) == (measure == "loss")
    return f"{arm} is {'better' if better else 'worse'} than {baseline}"
