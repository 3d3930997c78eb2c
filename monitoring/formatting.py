"""Numbers as people read them."""

from __future__ import annotations

import math


def percent(value: float) -> str:
    """0.123 -> `12.3 %`."""
    return f"{value * 100:.3g} %"


def scientific(value: float) -> str:
    """0.00015 -> `1.5e-4`."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def perplexity(loss: float) -> str:
    """Format exp(loss), for a mean cross-entropy in nats."""
    value = math.exp(loss) if loss < 20 else math.inf
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def plain(value: float) -> str:
    """Format a number with four significant digits."""
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """42 -> `42 s`, 200 -> `3 min 20 s`, 7320 -> `2 h 2 min`, 200000 -> `2 d 7 h`; not finite -> `?`."""
    if not math.isfinite(seconds):
        return "?"
    rounded = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for index, (unit, size) in enumerate(units):
        if rounded >= size:
            smaller = units[index + 1 : index + 2]
            rest = [f"{rounded % size // below} {name}" for name, below in smaller if rounded % size // below]
            return " ".join([f"{rounded // size} {unit}", *rest])
    return "0 s"
