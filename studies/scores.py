"""Scores of predictions by the field's libraries, and intervals for what they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = Sequence[Sequence[str]]
"""Of each example: its tags, its one label or its several labels."""
LEVEL = 0.95


def score(metric: str, gold: Labels, predicted: Labels, labels: Sequence[str], positive: str | None = None) -> float:
    """A Task's `score` of predictions in 0..1: entities by seqeval (micro, exact match), the others by scikit-learn."""
    if metric == "entity_f1":
        from seqeval.metrics import f1_score as entity_f1

        return float(entity_f1([list(row) for row in gold], [list(row) for row in predicted], zero_division=0))
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    if metric == "accuracy":
        return float(accuracy_score([row[0] for row in gold], [row[0] for row in predicted]))
    if metric == "binary_f1":
        ours, theirs = ([row[0] == positive for row in rows] for rows in (gold, predicted))
        return float(f1_score(ours, theirs, zero_division=0))
    table = MultiLabelBinarizer(classes=list(labels))
    average = metric.removesuffix("_f1")
    return float(f1_score(table.fit_transform(gold), table.fit_transform(predicted), average=average, zero_division=0))


def counts(
    metric: str, gold: Labels, predicted: Labels, labels: Sequence[str], positive: str | None = None
) -> NDArray[np.float64]:
    """[examples, classes, 3]: what is right, predicted and there, so that a score of any resample is a sum of them.

    Entities of all types are one class, as micro averages have it.
    """
    if metric == "entity_f1":
        from seqeval.metrics.sequence_labeling import get_entities

        pairs = [(set(get_entities(list(g))), set(get_entities(list(p)))) for g, p in zip(gold, predicted, strict=True)]
        return np.array([[[len(g & p), len(p), len(g)]] for g, p in pairs], np.float64)
    classes = [positive] if metric == "binary_f1" else list(labels)
    there = np.array([[label in row for label in classes] for row in gold], np.float64)
    found = np.array([[label in row for label in classes] for row in predicted], np.float64)
    return np.stack([there * found, found, there], axis=2)


def f1_of_counts(metric: str, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., classes, 3] summed counts -> [...] scores; for one label each, micro F1 is the accuracy."""
    if metric in ("micro_f1", "accuracy"):
        sums = sums.sum(-2, keepdims=True)
    right, predicted, there = np.moveaxis(sums, -1, 0)
    size = predicted + there
    by_class = np.divide(2 * right, size, out=np.zeros_like(right), where=size > 0)
    if metric == "weighted_f1":
        return (by_class * there).sum(-1) / there.sum(-1)
    result: NDArray[np.float64] = by_class.mean(-1)
    return result


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    """Ends of the 95 % interval; NaN where one value says nothing of the spread."""

    def as_row(self, prefix: str = "") -> dict[str, float | None]:
        return {prefix + key: value if math.isfinite(value) else None for key, value in asdict(self).items()}


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of a few independent values and its 95 % interval by Student's t, which is honest about how few they are."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    reach = float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - reach, mean + reach)


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> Interval:
    """Mean and its 95 % percentile bootstrap interval."""
    sample = np.asarray(values, np.float64)
    chosen = np.random.default_rng(seed).integers(len(sample), size=(draws, len(sample)))
    low, high = np.quantile(sample[chosen].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_bootstrap(
    metric: str, a: NDArray[np.float64], b: NDArray[np.float64], seed: int = 0, draws: int = 2000
) -> dict[str, Any]:
    """The difference of two models' scores, b - a, over resampled test examples and fine-tuning seeds.

    Args:
        a, b: [seeds, examples, classes, 3] of `counts`; both models' predictions for the same examples and seeds.

    Both models are scored on the same resample each time (Koehn 2004). `p` is two-sided: twice the smaller share of
    resamples on either side of no difference.
    """
    random = np.random.default_rng(seed)
    seeds, examples = a.shape[:2]
    differences = np.empty(draws)
    for draw in range(draws):
        weights = np.bincount(random.integers(examples, size=examples), minlength=examples)
        chosen = random.integers(seeds, size=seeds)
        sums = [np.einsum("e,secv->scv", weights, side[chosen], optimize=True) for side in (a, b)]
        differences[draw] = f1_of_counts(metric, sums[1]).mean() - f1_of_counts(metric, sums[0]).mean()
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    observed = f1_of_counts(metric, b.sum(1)).mean() - f1_of_counts(metric, a.sum(1)).mean()
    p = min(1.0, 2 * min((differences <= 0).mean(), (differences >= 0).mean()))
    return {"difference": float(observed), "low": float(low), "high": float(high), "p": float(p)}
