"""Scores of predictions by seqeval and scikit-learn, and 95 % intervals of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = Sequence[Sequence[str]]
"""Labels per example: its tags, its one label, or its several labels."""
LEVEL = 0.95
"""Level of all intervals."""


def score(metric: str, gold: Labels, predicted: Labels, labels: Sequence[str], positive: str | None = None) -> float:
    """Score predictions.

    Args:
        metric: A value of `Task.score`. Entity F1 is micro-averaged over exact matches.
        gold: True labels.
        predicted: Predicted labels of the same examples.
        labels: All labels of the task.
        positive: Label that `binary_f1` scores.

    Returns:
        The score in 0..1.
    """
    if metric == "entity_f1":
        from seqeval.metrics import f1_score as entity_f1

        return float(entity_f1([list(row) for row in gold], [list(row) for row in predicted], zero_division=0))
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    if metric == "accuracy":
        return float(accuracy_score([row[0] for row in gold], [row[0] for row in predicted]))
    if metric == "binary_f1":
        is_gold, is_predicted = ([row[0] == positive for row in rows] for rows in (gold, predicted))
        return float(f1_score(is_gold, is_predicted, zero_division=0))
    table = MultiLabelBinarizer(classes=list(labels))
    average = metric.removesuffix("_f1")
    return float(f1_score(table.fit_transform(gold), table.fit_transform(predicted), average=average, zero_division=0))


def counts(
    metric: str, gold: Labels, predicted: Labels, labels: Sequence[str], positive: str | None = None
) -> NDArray[np.float64]:
    """Count correct, predicted and true labels, so that a resample is scored from a sum of counts.

    The arguments are those of `score`. Entities of all types are one class, because their F1 is micro-averaged.

    Returns:
        `[examples, classes, 3]`, where the last axis is (correct, predicted, true).
    """
    if metric == "entity_f1":
        from seqeval.metrics.sequence_labeling import get_entities

        pairs = [(set(get_entities(list(g))), set(get_entities(list(p)))) for g, p in zip(gold, predicted, strict=True)]
        return np.array([[[len(g & p), len(p), len(g)]] for g, p in pairs], np.float64)
    classes = [positive] if metric == "binary_f1" else list(labels)
    is_gold, is_predicted = (
        np.array([[label in row for label in classes] for row in rows], np.float64) for rows in (gold, predicted)
    )
    return np.stack([is_gold * is_predicted, is_predicted, is_gold], axis=2)


def f1_of_counts(metric: str, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute scores from summed `counts`; with one label per example, micro F1 equals the accuracy.

    Args:
        metric: A value of `Task.score`.
        sums: `[..., classes, 3]`.

    Returns:
        `[...]` scores in 0..1.
    """
    if metric in ("micro_f1", "accuracy"):
        sums = sums.sum(-2, keepdims=True)
    correct, predicted, gold = np.moveaxis(sums, -1, 0)
    total = predicted + gold
    by_class = np.divide(2 * correct, total, out=np.zeros_like(correct), where=total > 0)
    if metric == "weighted_f1":
        return (by_class * gold).sum(-1) / gold.sum(-1)
    result: NDArray[np.float64] = by_class.mean(-1)
    return result


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    """`low` and `high` are NaN for a single value, which shows no spread."""

    def as_row(self, prefix: str = "") -> dict[str, float | None]:
        """Return the three numbers by name, with None for NaN."""
        return {prefix + key: value if math.isfinite(value) else None for key, value in asdict(self).items()}


def mean_interval(values: Sequence[float]) -> Interval:
    """Compute the mean of a few independent values and its interval by Student's t, which is wide for few samples."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half_width = float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half_width, mean + half_width)


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> Interval:
    """Compute the mean and its percentile bootstrap interval."""
    sample = np.asarray(values, np.float64)
    chosen = np.random.default_rng(seed).integers(len(sample), size=(draws, len(sample)))
    low, high = np.quantile(sample[chosen].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_bootstrap(
    metric: str, a: NDArray[np.float64], b: NDArray[np.float64], seed: int = 0, draws: int = 2000
) -> dict[str, Any]:
    """Compare two models by a paired bootstrap over test examples and fine-tuning seeds (Koehn 2004).

    Each resample scores both models on the same examples and seeds.

    Args:
        metric: A value of `Task.score`.
        a: `[seeds, examples, classes, 3]`, the `counts` of the first model.
        b: The same of the second model.
        seed: Seed of the resampling.
        draws: Number of resamples.

    Returns:
        `difference` (b - a), the ends `low` and `high` of its interval, and the two-sided `p`: twice the smaller share
        of resamples on either side of zero.
    """
    random = np.random.default_rng(seed)
    seeds, examples = a.shape[:2]
    differences = np.empty(draws)
    for draw in range(draws):
        weights = np.bincount(random.integers(examples, size=examples), minlength=examples)
        chosen = random.integers(seeds, size=seeds)
        sums = [np.einsum("e,secv->scv", weights, table[chosen], optimize=True) for table in (a, b)]
        differences[draw] = f1_of_counts(metric, sums[1]).mean() - f1_of_counts(metric, sums[0]).mean()
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    observed = f1_of_counts(metric, b.sum(1)).mean() - f1_of_counts(metric, a.sum(1)).mean()
    p = min(1.0, 2 * min((differences <= 0).mean(), (differences >= 0).mean()))
    return {"difference": float(observed), "low": float(low), "high": float(high), "p": float(p)}
