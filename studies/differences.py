"""Paired comparison of a study's arms: same data, same seed, one setting changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from studies.intervals import LEVEL, Interval, holm, mean_interval, paired_p
from studies.plan import is_seed

Record = dict[str, Any]
"""Results of one trial, as its file in `records` holds them."""


@dataclass(frozen=True)
class Difference:
    """Difference between an arm and the baseline in one measure, over the seeds of one setting."""

    arm: str
    baseline: str
    measure: str
    """`loss` (nats, lower is better) or the name of a task (0..1, higher is better)."""
    at: dict[str, Any]
    """Grid keys that are no seeds, and their values. Settings are never pooled as if they were seeds."""
    pairs: tuple[float, ...]
    """arm - baseline, one value per combination of seeds."""
    students: Interval
    p: float | None
    """Student's; None if the pairs show no spread."""
    p_holm: float | None
    """`p` corrected for all comparisons of the study (Holm 1979)."""
    verdict: str


def differences(records: Sequence[Record], baseline: str) -> list[Difference]:
    """Compare every arm with the baseline, in the loss and in every task, at every setting of the grid."""
    by_arm_and_point = {(record["arm"], str(record["point"])): record for record in records}
    settings: dict[str, list[str]] = {}
    for record in records:
        points = settings.setdefault(str(setting(record)), [])
        if str(record["point"]) not in points:
            points.append(str(record["point"]))
    named = {str(setting(record)): setting(record) for record in records}
    compared = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        if arm == baseline:
            continue
        for measure in measures(records):
            for key, points in settings.items():
                pairs = tuple(
                    value(by_arm_and_point[arm, point], measure) - value(by_arm_and_point[baseline, point], measure)
                    for point in points
                )
                compared.append((arm, measure, named[key], pairs, paired_p(pairs)))
    corrected = holm([entry[-1] for entry in compared])
    return [
        Difference(
            arm,
            baseline,
            measure,
            at,
            pairs,
            mean_interval(pairs),
            p,
            p_holm,
            _verdict(arm, baseline, measure, pairs, p_holm),
        )
        for (arm, measure, at, pairs, p), p_holm in zip(compared, corrected, strict=True)
    ]


def setting(record: Record) -> dict[str, Any]:
    """Return the grid point of a trial without its seeds."""
    return {key: chosen for key, chosen in record["point"].items() if not is_seed(key)}


def order(record: Record) -> str:
    """Return the seeds of a trial: those with the same seeds are pairs."""
    return str({key: chosen for key, chosen in record["point"].items() if is_seed(key)})


def measures(records: Sequence[Record]) -> list[str]:
    """List the loss and the tasks that the records have scores of."""
    return ["loss", *dict.fromkeys(task for record in records for task in record["scores"])]


def value(record: Record, measure: str) -> float:
    """Return the loss, or a task's mean score over the fine-tuning seeds."""
    return record["loss"] if measure == "loss" else fmean(record["scores"][measure])


def _verdict(arm: str, baseline: str, measure: str, pairs: Sequence[float], p_holm: float | None) -> str:
    if p_holm is None:
        return "no verdict: one pair, or equal pairs, show no spread"
    if p_holm > 1 - LEVEL:
        return "no difference shown"
    better = (fmean(pairs) < 0) == (measure == "loss")
    return f"{arm} is {'better' if better else 'worse'} than {baseline}"
