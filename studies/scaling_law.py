"""Power laws of the loss in parameters and tokens: L = E + sum_i A_i x_i^-a_i (Hoffmann et al. 2022, approach 3).

The fit searches theta = (log E, log A_1.., log a_1..), where each A belongs to x divided by its geometric mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from studies.intervals import LEVEL, Interval

Array = NDArray[np.float64]
PLAUSIBLE = (1e-3, 5.0)
"""Range of exponents; outside it the points do not determine a law."""
STARTS = (0.2, 0.5, 1.0)
"""Exponents that the search starts from; the best result is kept."""


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law and the points that it was fitted to."""

    names: tuple[str, ...]
    """Quantities that were varied: `parameters`, `tokens` or both."""
    irreducible: Interval
    """E, in nats."""
    factors: tuple[float, ...]
    """A, one per name."""
    exponents: tuple[Interval, ...]
    """a, one per name."""
    residuals: tuple[float, ...]
    """log(fitted loss / loss), one per point."""
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    """Range of the points per name; beyond it the law is extrapolated."""

    def predict(self, *x: float) -> float:
        """Compute the loss at one value per name."""
        terms = zip(self.factors, x, self.exponents, strict=True)
        return self.irreducible.mean + sum(factor * value**-e.mean for factor, value, e in terms)

    def inside(self, *x: float) -> bool:
        """Tell whether the values lie within the range of the points."""
        bounds = zip(self.lowest, x, self.highest, strict=True)
        return all(low * 0.999 <= value <= high * 1.001 for low, value, high in bounds)


@dataclass(frozen=True)
class Optimum:
    """The best division of a compute budget between parameters and tokens."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    extrapolated: bool


def fit(names: Sequence[str], x: Array, loss: Array, *, draws: int = 400, seed: int = 0) -> PowerLaw:
    """Fit a law by least squares of the log loss, with 95 % intervals by a bootstrap of the residuals.

    Residuals are smaller than the noise, because the fit of p numbers follows it. They are therefore scaled by
    sqrt(n / (n - p)) before they are drawn. An interval is the estimate and t(n - p) bootstrap standard deviations of
    its logarithm on either side; the percentiles replace an end that they exceed.

    Args:
        names: Quantities that were varied.
        x: `[points, names]`, positive.
        loss: `[points]`, positive, in nats.
        draws: Number of bootstrap fits.
        seed: Seed of the bootstrap.

    Raises:
        InputError: There are fewer than p + 2 points, or the points follow no law.
    """
    points, terms = x.shape
    numbers = 1 + 2 * terms
    if points < numbers + 2:
        raise InputError(
            f"a power law in {' and '.join(names)} needs {numbers + 2} points or more, there are {points}",
            code="too-few-points",
        )
    center = np.exp(np.log(x).mean(0))
    scaled, target = np.log(x / center), np.log(loss)
    theta = _best_fit(scaled, target, loss)
    for name, logarithm in zip(names, theta[1 + terms :], strict=True):
        if not math.log(PLAUSIBLE[0]) < logarithm < math.log(PLAUSIBLE[1]):
            raise InputError(
                f"the losses follow no power law in {name}; vary it more, or train longer", code="no-power-law"
            )
    residuals = _residuals(theta, scaled, target)
    freedom = points - numbers
    noise = residuals * math.sqrt(points / freedom)
    random = np.random.default_rng(seed)
    fitted = target + residuals
    drawn = np.array([_solve(theta, scaled, fitted + random.choice(noise, points)) for _ in range(draws)])
    irreducible, *others = (_interval(theta[i], drawn[:, i], freedom) for i in (0, *range(1 + terms, numbers)))
    return PowerLaw(
        names=tuple(names),
        irreducible=irreducible,
        factors=tuple(math.exp(theta[1 + i]) * float(center[i]) ** e.mean for i, e in enumerate(others)),
        exponents=tuple(others),
        residuals=tuple(map(float, residuals)),
        lowest=tuple(map(float, x.min(0))),
        highest=tuple(map(float, x.max(0))),
    )


def frontier(law: PowerLaw, flops: Sequence[float]) -> list[Optimum]:
    """Compute the parameters and tokens of least loss for each budget C = 6 N D.

    Args:
        law: A law in parameters and tokens.
        flops: Budgets.
    """
    (a, b), (factor_a, factor_b) = law.exponents, law.factors
    ratio = (a.mean * factor_a / (b.mean * factor_b)) ** (1 / (a.mean + b.mean))
    optima = []
    for budget in flops:
        parameters = ratio * (budget / 6) ** (b.mean / (a.mean + b.mean))
        tokens = budget / 6 / parameters
        loss = law.predict(parameters, tokens)
        optima.append(Optimum(budget, parameters, tokens, loss, not law.inside(parameters, tokens)))
    return optima


def _best_fit(scaled: Array, target: Array, loss: Array) -> Array:
    """Search from several starts and keep the least sum of squares."""
    starts = [_start(exponent, share, loss, scaled.shape[1]) for exponent in STARTS for share in (0.2, 0.8)]
    fits = [_solve(start, scaled, target) for start in starts]
    return min(fits, key=lambda theta: float(np.square(_residuals(theta, scaled, target)).sum()))


def _interval(estimate: float, drawn: Array, freedom: int) -> Interval:
    """Compute the interval of exp(estimate); the spread is the scaled median deviation, which outliers do not move."""
    from scipy.stats import t

    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    reach = float(t.ppf((1 + LEVEL) / 2, freedom))
    spread = reach * 1.4826 * float(np.median(np.abs(drawn - np.median(drawn))))
    low, high = min(low, estimate - spread), max(high, estimate + spread)
    return Interval(*(math.exp(min(700.0, float(value))) for value in (estimate, low, high)))


def _start(exponent: float, share: float, loss: Array, terms: int) -> Array:
    """Build a theta whose irreducible loss is a share of the least loss."""
    least = float(loss.min())
    rest = max(1e-6, float(np.median(loss)) - share * least) / terms
    return np.array([math.log(share * least), *[math.log(rest)] * terms, *[math.log(exponent)] * terms])


def _residuals(theta: Array, scaled: Array, target: Array) -> Array:
    return np.asarray(np.log(_terms(theta, scaled).sum(1)) - target)


def _terms(theta: Array, scaled: Array) -> Array:
    """Compute E and each A x^-a: `[points, 1 + terms]`."""
    count = scaled.shape[1]
    powers = np.exp(np.clip(theta[1 : 1 + count] - np.exp(np.clip(theta[1 + count :], -30, 5)) * scaled, -60, 60))
    return np.concatenate([np.full((len(scaled), 1), np.exp(np.clip(theta[0], -60, 60))), powers], axis=1)


def _jacobian(theta: Array, scaled: Array, target: Array) -> Array:
    count = scaled.shape[1]
    terms = _terms(theta, scaled)
    shares = terms / terms.sum(1, keepdims=True)
    return np.concatenate([shares, -shares[:, 1:] * np.exp(theta[1 + count :]) * scaled], axis=1)


def _solve(start: Array, scaled: Array, target: Array) -> Array:
    from scipy.optimize import least_squares

    solution = least_squares(_residuals, start, jac=_jacobian, method="lm", args=(scaled, target), max_nfev=200)
    return np.asarray(solution.x)
