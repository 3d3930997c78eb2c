"""Power laws of loss against parameters and tokens: L = E + sum_i A_i x_i^-a_i (Hoffmann et al. 2022, approach 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from studies.scores import LEVEL, Interval

Array = NDArray[np.float64]
PLAUSIBLE = (1e-3, 5.0)
"""Exponents outside mean that the points do not determine a law."""
STARTS = (0.2, 0.5, 1.0)
"""Exponents the search starts from; the best end is kept."""


@dataclass(frozen=True)
class PowerLaw:
    names: tuple[str, ...]
    """What was varied: `parameters`, `tokens` or both."""
    irreducible: Interval
    """E, in nats."""
    factors: tuple[float, ...]
    exponents: tuple[Interval, ...]
    residuals: tuple[float, ...]
    """log(fitted loss / loss) of each point."""
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    """Range of the points; beyond it the law is extrapolated."""

    def predict(self, *x: float) -> float:
        """Loss at one value of each name."""
        terms = zip(self.factors, x, self.exponents, strict=True)
        return self.irreducible.mean + sum(factor * value**-e.mean for factor, value, e in terms)

    def inside(self, *x: float) -> bool:
        bounds = zip(self.lowest, x, self.highest, strict=True)
        return all(low * 0.999 <= value <= high * 1.001 for low, value, high in bounds)


def fit(names: Sequence[str], x: Array, loss: Array, *, draws: int = 400, seed: int = 0) -> PowerLaw:
    """Least squares of log loss by SciPy, and 95 % intervals by a bootstrap of the residuals.

    Args:
        x: [points, names], positive.
        loss: [points], positive.

    The residuals are spread by sqrt(n / (n - p)) before they are drawn, for a fit of p numbers makes them smaller than
    the noise. An interval is the estimate and t(n - p) bootstrap standard deviations of its logarithm either side, or
    the percentiles where they reach further. InputError for fewer than p + 2 points or none that follow a law.
    """
    from scipy.stats import t

    points, kinds = x.shape
    numbers = 1 + 2 * kinds
    if points < numbers + 2:
        raise InputError(f"a power law in {' and '.join(names)} needs {numbers + 2} points or more, there are {points}")
    middle = np.exp(np.log(x).mean(0))
    scaled, target = np.log(x / middle), np.log(loss)
    starts = [_start(exponent, share, loss, kinds) for exponent in STARTS for share in (0.2, 0.8)]
    found = [_solve(start, scaled, target) for start in starts]
    best = min(found, key=lambda theta: float(np.square(_residuals(theta, scaled, target)).sum()))
    for name, logarithm in zip(names, best[1 + kinds :], strict=True):
        if not math.log(PLAUSIBLE[0]) < logarithm < math.log(PLAUSIBLE[1]):
            raise InputError(f"the losses follow no power law in {name}; vary it more, or train longer")
    residuals = _residuals(best, scaled, target)
    freedom = points - numbers
    wide = residuals * math.sqrt(points / freedom)
    random = np.random.default_rng(seed)
    fitted = target + residuals
    drawn = np.array([_solve(best, scaled, fitted + random.choice(wide, points)) for _ in range(draws)])
    reach = float(t.ppf((1 + LEVEL) / 2, freedom))

    def interval(place: int) -> Interval:
        center, values = best[place], drawn[:, place]
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        spread = reach * 1.4826 * float(np.median(np.abs(values - np.median(values))))
        low, high = min(low, center - spread), max(high, center + spread)
        return Interval(*(math.exp(min(700.0, float(value))) for value in (center, low, high)))

    exponents = tuple(interval(1 + kinds + kind) for kind in range(kinds))
    return PowerLaw(
        names=tuple(names),
        irreducible=interval(0),
        factors=tuple(float(math.exp(best[1 + kind]) * middle[kind] ** exponents[kind].mean) for kind in range(kinds)),
        exponents=exponents,
        residuals=tuple(map(float, residuals)),
        lowest=tuple(map(float, x.min(0))),
        highest=tuple(map(float, x.max(0))),
    )


@dataclass(frozen=True)
class Optimum:
    """The best division of a budget of compute."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    extrapolated: bool


def frontier(law: PowerLaw, flops: Sequence[float]) -> list[Optimum]:
    """Parameters and tokens of least loss for each budget C = 6 N D of a law in both."""
    (a, b), (factor_a, factor_b) = law.exponents, law.factors
    ratio = (a.mean * factor_a / (b.mean * factor_b)) ** (1 / (a.mean + b.mean))
    optima = []
    for budget in flops:
        parameters = ratio * (budget / 6) ** (b.mean / (a.mean + b.mean))
        tokens = budget / 6 / parameters
        loss = law.predict(parameters, tokens)
        optima.append(Optimum(budget, parameters, tokens, loss, not law.inside(parameters, tokens)))
    return optima


def _start(exponent: float, share: float, loss: Array, kinds: int) -> Array:
    least = float(loss.min())
    rest = max(1e-6, float(np.median(loss)) - share * least) / kinds
    return np.array([math.log(share * least), *[math.log(rest)] * kinds, *[math.log(exponent)] * kinds])


def _residuals(theta: Array, scaled: Array, target: Array) -> Array:
    return np.asarray(np.log(_terms(theta, scaled).sum(1)) - target)


def _terms(theta: Array, scaled: Array) -> Array:
    """[points, 1 + kinds]: E and each A x^-a."""
    kinds = scaled.shape[1]
    terms = np.exp(np.clip(theta[1 : 1 + kinds] - np.exp(np.clip(theta[1 + kinds :], -30, 5)) * scaled, -60, 60))
    return np.concatenate([np.full((len(scaled), 1), np.exp(np.clip(theta[0], -60, 60))), terms], axis=1)


def _jacobian(theta: Array, scaled: Array, target: Array) -> Array:
    kinds = scaled.shape[1]
    terms = _terms(theta, scaled)
    shares = terms / terms.sum(1, keepdims=True)
    return np.concatenate([shares, -shares[:, 1:] * np.exp(theta[1 + kinds :]) * scaled], axis=1)


def _solve(start: Array, scaled: Array, target: Array) -> Array:
    from scipy.optimize import least_squares

    found = least_squares(_residuals, start, jac=_jacobian, method="lm", args=(scaled, target), max_nfev=200)
    return np.asarray(found.x)
