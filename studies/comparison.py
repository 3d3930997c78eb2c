"""The comparison of a study's arms as a page, a table to paste, and charts: each pair, its mean and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from configs.units import format_count
from monitoring.charts import WIDE, Line, line_chart
from monitoring.page import Figure
from studies.differences import Difference, Record, measures, setting, value
from studies.intervals import LEVEL

FEWEST_SIZES = 3
"""Sizes from which on the gain's slope is estimated."""


def cells_of(difference: Difference) -> dict[str, Any]:
    """Return one comparison as cells of a table."""
    scale, unit = scale_of(difference.measure)

    def interval(low: float, high: float) -> str:
        return f"{scale * low:+.3f} to {scale * high:+.3f}" if math.isfinite(low) else "-"

    return {
        "arms": f"{difference.arm} - {difference.baseline}",
        "at": ", ".join(f"{key} {chosen}" for key, chosen in difference.at.items()) or "all",
        "measure": f"{difference.measure} ({unit})",
        "pairs": len(difference.pairs),
        "mean difference": f"{scale * fmean(difference.pairs):+.3f}",
        "95 % interval": interval(difference.students.low, difference.students.high),
        "p": "-" if difference.p is None else f"{difference.p:.2g}",
        "p, corrected": "-" if difference.p_holm is None else f"{difference.p_holm:.2g}",
        "verdict": difference.verdict,
    }


def scale_of(measure: str) -> tuple[int, str]:
    """Return factor and unit of a measure's differences."""
    return (1, "nats") if measure == "loss" else (100, "points")


def difference_charts(compared: Sequence[Difference]) -> list[Figure]:
    """Draw one chart per measure. Each comparison has its pairs as dots, and a bar from end to end of its interval."""
    figures = []
    for measure in dict.fromkeys(difference.measure for difference in compared):
        own = [difference for difference in compared if difference.measure == measure]
        scale, unit = scale_of(measure)
        lines = [Line("no difference", [(0.5, 0.0), (len(own) + 0.5, 0.0)], "ink", faint=True)]
        keys = []
        for number, difference in enumerate(own, 1):
            color = f"c{(number - 1) % 8}"
            at = ", ".join(str(chosen) for chosen in difference.at.values())
            keys.append(Line(f"{number}: {difference.arm}{f' at {at}' if at else ''}", [], color))
            lines += [Line("pair", [(number - 0.1, scale * pair)], color) for pair in difference.pairs]
            ends = [(number + 0.1, scale * end) for end in (difference.students.low, difference.students.high)]
            lines += [
                Line("interval", ends, color),
                Line("mean", [(number + 0.1, scale * fmean(difference.pairs))], color),
            ]
        title = f"{measure}: difference to {own[0].baseline} in {unit} (dots left: pairs; bar: 95 % interval)"
        chart = line_chart(title, lines, number=lambda y: f"{y:+.3g}", x_name="comparison", x_number=_whole, size=WIDE)
        figures.append(Figure(title, chart, keys=keys, wide=True))
    return figures


def slopes(records: Sequence[Record], baseline: str) -> list[dict[str, Any]]:
    """Estimate how each arm's gain changes with the size of the model, per doubling of the parameters.

    Returns:
        Per arm and measure: `arm`, `measure`, `sizes`, `pairs` (parameters and difference), `slope`, `low` and `high`.
        Empty if fewer than three sizes were trained.
    """
    from scipy.stats import linregress, t

    by_arm_and_point = {(record["arm"], str(record["point"])): record for record in records}
    rows = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        own = [record for record in records if record["arm"] == arm]
        sizes = sorted({record["parameters"] for record in own})
        others = {str({**setting(record), "parameters": None, "model.init": None}) for record in own}
        if arm == baseline or len(sizes) < FEWEST_SIZES or len(others) > 1:
            continue
        for measure in measures(records):
            pairs = [
                (
                    record["parameters"],
                    value(record, measure) - value(by_arm_and_point[baseline, str(record["point"])], measure),
                )
                for record in own
            ]
            fit = linregress([math.log2(size) for size, _ in pairs], [difference for _, difference in pairs])
            half_width = float(t.ppf((1 + LEVEL) / 2, len(pairs) - 2) * fit.stderr)
            slope = float(fit.slope)
            ends = {"slope": slope, "low": slope - half_width, "high": slope + half_width}
            rows.append({"arm": arm, "measure": measure, "sizes": len(sizes), "pairs": pairs, **ends})
    return rows


def slope_figures(rows: Sequence[dict[str, Any]], baseline: str) -> list[Figure]:
    """Draw the gain against the size of the model: pairs as dots, means as a line."""
    figures = []
    for row in rows:
        scale, unit = scale_of(row["measure"])
        by_size: dict[int, list[float]] = {}
        for size, difference in row["pairs"]:
            by_size.setdefault(size, []).append(scale * difference)
        means = [(math.log10(size), fmean(values)) for size, values in sorted(by_size.items())]
        dots = [Line("pair", [(math.log10(size), scale * difference)], "c0") for size, difference in row["pairs"]]
        title = (
            f"{row['measure']}: {row['arm']} - {baseline} against parameters; {scale * row['slope']:+.3f} {unit} per "
            f"doubling, 95 % interval {scale * row['low']:+.3f} to {scale * row['high']:+.3f}"
        )
        chart = line_chart(
            title,
            [Line("mean", means, "c0"), *dots],
            number=lambda y: f"{y:+.3g}",
            x_name="parameters",
            x_number=lambda log: format_count(10**log),
            size=WIDE,
        )
        figures.append(Figure(title, chart, wide=True))
    return figures


def _whole(number: float) -> str:
    return f"{number:.0f}" if np.isclose(number, round(number)) else ""
