"""Intervals at 95 %, and tests of differences that hold for few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studies.scores import CORRELATIONS, score_of_sums

LEVEL = 0.95
"""Level of all intervals."""
FEWEST_SEEDS = 5
"""Fine-tuning seeds per model from which on two models are tested."""
SAME = 1e-12
"""Standard error of differences below which they differ by the rounding of fp64 alone, as 0.9 - 0.8 and 0.8 - 0.7."""
CHUNK = 250
"""Resamples that are summed at once, to bound the memory."""
Array = NDArray[np.float64]


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


def score_interval(metric: str, values: Sequence[float]) -> Interval:
    """Compute the mean of a few scores and its interval, which keeps to the bounds of the score.

    Student's interval is taken of the mean's log odds, so it never reaches a bound that the mean does not reach.
    """
    lowest = -1.0 if metric in CORRELATIONS else 0.0
    plain = mean_interval(values)
    share = (plain.mean - lowest) / (1 - lowest)
    if not math.isfinite(plain.low) or not 0 < share < 1:
        return plain if not math.isfinite(plain.low) else Interval(plain.mean, plain.mean, plain.mean)
    centre = math.log(share / (1 - share))
    half_width = (plain.high - plain.mean) / (1 - lowest) / (share * (1 - share))

    def back(odds: float) -> float:
        return lowest + (1 - lowest) * 0.5 * (1 + math.tanh(odds / 2))

    return Interval(plain.mean, back(centre - half_width), back(centre + half_width))


def paired_p(pairs: Sequence[float]) -> float | None:
    """Test by Student's t whether the mean of paired differences is zero; None for a single pair or no spread."""
    from scipy.stats import t

    if len(pairs) < 2:
        return None
    error = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs))
    mean = float(np.mean(pairs))
    if error < SAME:
        return 1.0 if abs(mean) < SAME else None
    return max(float(2 * t.sf(abs(mean) / error, len(pairs) - 1)), np.finfo(np.float64).tiny)


def paired_bootstrap(metric: str, a: Array, b: Array, seed: int = 0, draws: int = 2000) -> dict[str, Any]:
    """Compare two models by a paired bootstrap over the test examples, widened by the spread of the seeds.

    The resamples score both models on the same examples, seed by seed. The variance of the difference has three
    parts: seeds, examples, and examples within a seed, which the first two both contain and which is subtracted once.
    Five seeds estimate their part poorly, so Student's t is taken with the degrees of freedom of Satterthwaite (1946).
    Resampling five seeds instead rejects a true null in 6 to 12 % of cases.

    Args:
        metric: A value of `Task.score`.
        a: `[seeds, examples, classes, counts]`, the `counts` of the first model.
        b: The same of the second model.
        seed: Seed of the resampling.
        draws: Number of resamples.

    Returns:
        `difference` (b - a), the ends `low` and `high` of its interval, and the two-sided `p`, which is at least
        1 / (draws + 1). The last three are None below 5 seeds, because so few show nothing of other seeds.
    """
    from scipy.stats import t

    observed = score_of_sums(metric, b.sum(1)) - score_of_sums(metric, a.sum(1))
    difference, seeds = float(observed.mean()), len(observed)
    if seeds < FEWEST_SEEDS:
        return {"difference": difference, "low": None, "high": None, "p": None}
    drawn = _resampled(metric, a, b, np.random.default_rng(seed), draws)
    of_examples = float(drawn.mean(1).var(ddof=1))
    within = max(0.0, (float(drawn.var(0, ddof=1).mean()) - of_examples) / (seeds - 1))
    of_seeds = float(observed.var(ddof=1)) / seeds
    variance = max(of_seeds + max(of_examples - within, 0.0), of_examples)
    lowest = -2.0 if metric in CORRELATIONS else -1.0
    if variance == 0:
        same = difference == 0
        return {"difference": difference, "low": difference, "high": difference, "p": 1.0 if same else 1 / (draws + 1)}
    freedom = (seeds - 1) * (variance / of_seeds) ** 2 if of_seeds > 0 else math.inf
    half_width = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
    return {
        "difference": difference,
        "low": max(lowest, difference - half_width),
        "high": min(-lowest, difference + half_width),
        "p": max(float(2 * t.sf(abs(difference) / math.sqrt(variance), freedom)), 1 / (draws + 1)),
    }


def examples_bootstrap(metric: str, a: Array, b: Array, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Compare two predictors that have no seeds by a paired bootstrap over the test examples.

    Args:
        metric: A value of `Task.score`.
        a: `[1, examples, classes, counts]` of the first.
        b: The same of the second.
        seed: Seed of the resampling.
        draws: Number of resamples.

    Returns:
        `difference` (b - a), and the ends `low` and `high` of its interval. It holds for these weights only.
    """
    drawn = _resampled(metric, a, b, np.random.default_rng(seed), draws)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    observed = score_of_sums(metric, b.sum(1)) - score_of_sums(metric, a.sum(1))
    return {"difference": float(observed.mean()), "low": float(low), "high": float(high)}


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for their number (Holm 1979); None stays None and is not counted."""
    order = sorted((value, index) for index, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * value))
        corrected[index] = largest
    return corrected


def _resampled(metric: str, a: Array, b: Array, random: np.random.Generator, draws: int) -> Array:
    """Score resamples of the examples: `[draws, seeds]` differences b - a."""
    examples = a.shape[1]
    flat = [np.ascontiguousarray(table.transpose(1, 0, 2, 3)).reshape(examples, -1) for table in (a, b)]
    shape = (a.shape[0], *a.shape[2:])
    parts = []
    for start in range(0, draws, CHUNK):
        rows = min(CHUNK, draws - start)
        chosen = random.integers(examples, size=(rows, examples))
        weights = np.stack([np.bincount(row, minlength=examples) for row in chosen]).astype(np.float64)
        first, second = (score_of_sums(metric, (weights @ table).reshape(rows, *shape)) for table in flat)
        parts.append(second - first)
    return np.concatenate(parts)
