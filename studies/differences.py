"""Paired comparison of a study's arms: same data, same seed, one setting changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from studies.scores import Interval, bootstrap_interval, mean_interval

Record = dict[str, Any]
"""Results of one trial, as its file in `records` holds them."""


@dataclass(frozen=True)
class Difference:
    """Difference between an arm and the baseline in one measure, over all grid points."""

    arm: str
    baseline: str
    measure: str
    """`loss` (nats, lower is better) or the name of a task (0..1, higher is better)."""
    pairs: tuple[float, ...]
    """arm - baseline, one value per grid point."""
    bootstrap: Interval
    students: Interval
    verdict: str


def differences(records: Sequence[Record], baseline: str) -> list[Difference]:
    """Compare every arm with the baseline, in the loss and in every task."""
    by_arm_and_point = {(record["arm"], str(record["point"])): record for record in records}
    points = list(dict.fromkeys(str(record["point"]) for record in records))
    compared = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        if arm == baseline:
            continue
        for measure in measures(records):
            pairs = tuple(
                value(by_arm_and_point[arm, point], measure) - value(by_arm_and_point[baseline, point], measure)
                for point in points
            )
            students = mean_interval(pairs)
            verdict = _verdict(arm, baseline, measure, students)
            compared.append(Difference(arm, baseline, measure, pairs, bootstrap_interval(pairs), students, verdict))
    return compared


def measures(records: Sequence[Record]) -> list[str]:
    """List the loss and the tasks that the records have scores of."""
    return ["loss", *dict.fromkeys(task for record in records for task in record["scores"])]


def value(record: Record, measure: str) -> float:
    """Return the loss, or a task's mean score over the fine-tuning seeds."""
    return record["loss"] if measure == "loss" else fmean(record["scores"][measure])


def _verdict(arm: str, baseline: str, measure: str, interval: Interval) -> str:
    """Judge by Student's interval, because the bootstrap's is too narrow for few pairs."""
    if not math.isfinite(interval.low):
        return "no verdict: one pair shows no spread"
    if interval.low <= 0 <= interval.high:
        return "no difference shown"
    better = (interval.mean < 0) == (measure == "loss")
    return f"{arm} is {'better' if better else 'worse'} than {baseline}"
