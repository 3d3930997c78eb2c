"""Line charts as inline SVG. Colours and fonts come from the style sheet of the page, so a chart follows its theme."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDE, HALF = (1064, 320), (514, 240)
"""Width and height in pixels, for the full page and for one of two columns."""
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 24, 34
"""Margins in pixels."""
MOST_POINTS = 900
"""Most points drawn per line. A longer line is thinned, and its peaks are kept."""

NOTHING = Markup('<p class="empty">Nothing logged yet.</p>')
"""Stands in place of a chart without data."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve. `color` is a class of the style sheet; a faint line is the raw data behind a smoothed line."""

    name: str
    points: Sequence[Point]
    color: str
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A moment on the horizontal axis. `kind` is a class of the style sheet: switch, checkpoint or fault."""

    x: float
    kind: str
    label: str


@dataclass(frozen=True)
class Band:
    """A named range of the horizontal axis, for instance a phase."""

    start: float
    end: float
    label: str
    color: str


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    number: Callable[[float], str],
    x_name: str = "step",
    x_number: Callable[[float], str] = lambda x: f"{x:,.0f}",
    marks: Sequence[Mark] = (),
    bands: Sequence[Band] = (),
    from_zero: bool = False,
    size: tuple[int, int] = HALF,
) -> Markup:
    """Draw an accessible `<svg>` of lines. Points that are not finite are gaps.

    Args:
        title: Name of the chart, for screen readers.
        lines: The curves.
        number: Formats a value of the vertical axis, with its unit.
        x_name: Name of the horizontal axis.
        x_number: Formats a value of the horizontal axis.
        marks: Moments to mark.
        bands: Ranges to shade behind the curves.
        from_zero: The vertical axis starts at zero.
        size: Width and height in pixels.
    """
    width, height = size
    finite = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not finite:
        return NOTHING
    x_values = [x for x, _ in finite] + [edge for band in bands for edge in (band.start, band.end)]
    lowest, highest = min(y for _, y in finite), max(y for _, y in finite)
    x_ticks = ticks(min(x_values), max(x_values), width // 80)
    y_ticks = ticks(0.0, highest or 1.0, 5) if from_zero else ticks(lowest, highest, 5)
    low_x, high_x = min(x_values), max(x_values)
    low_y, high_y = y_ticks[0], y_ticks[-1]

    def x_at(x: float) -> float:
        return LEFT + (x - low_x) / ((high_x - low_x) or 1) * (width - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return height - BOTTOM - (y - low_y) / ((high_y - low_y) or 1) * (height - TOP - BOTTOM)

    floor = height - BOTTOM
    scale = json.dumps({"x": [LEFT, width - RIGHT, low_x, high_x], "y": [floor, TOP, low_y, high_y], "xName": x_name})
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'data-scale="{escape(scale)}">'
    ]
    for band in bands:
        left, right = x_at(band.start), x_at(band.end)
        parts.append(
            f'<rect class="band {band.color}" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
            f'height="{floor - TOP}"/><text class="band-name {band.color}" x="{left + 6:.1f}" y="{TOP - 7}">'
            f"{escape(band.label)}</text>"
        )
    for y in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y_at(y) + 4:.1f}" text-anchor="end">{escape(number(y))}</text>'
        )
    for x in (x for x in x_ticks if low_x <= x <= high_x):
        parts.append(
            f'<text class="tick" x="{x_at(x):.1f}" y="{floor + 18}" text-anchor="middle">{escape(x_number(x))}</text>'
        )
    parts.append(f'<text class="tick" x="{width - RIGHT}" y="{height - 1}" text-anchor="end">{escape(x_name)}</text>')
    for mark in marks:
        x = x_at(mark.x)
        shape = (
            f'<path d="M{x:.1f} {floor}l-3.5 6h7z"/>'
            if mark.kind == "checkpoint"
            else f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>'
        )
        parts.append(f'<g class="mark {mark.kind}"><title>{escape(mark.label)}</title>{shape}</g>')
    for line in lines:
        for run in _unbroken(_thinned(line.points)):
            path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in run)
            style = f"line {line.color}{' faint' if line.faint else ''}"
            if len(run) == 1:
                x, y = run[0]
                parts.append(f'<circle class="dot {line.color}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="2.5"/>')
            else:
                parts.append(f'<polyline class="{style}" points="{path}"><title>{escape(line.name)}</title></polyline>')
    parts.append("</svg>")
    return Markup("".join(parts))


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Average exponentially over about a fortieth of the points, corrected for the start. Gaps are left out."""
    keep = 1 - 1 / max(1.0, len(points) / 40)
    total = weight = 0.0
    result = []
    for x, y in points:
        if math.isfinite(y):
            total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
            result.append((x, total / weight))
    return result


def ticks(low: float, high: float, count: int) -> list[float]:
    """Choose about `count` round numbers that enclose [low, high]."""
    if high - low <= max(1e-30, 1e-9 * abs(low), 1e-9 * abs(high)):
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most MOST_POINTS points: the lowest and the highest of each stretch, in order."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS / 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        gaps = [point for point in stretch if not math.isfinite(point[1])]
        finite = [point for point in stretch if math.isfinite(point[1])]
        ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])} if finite else set()
        kept += sorted(ends | set(gaps[:1]))
    return kept


def _unbroken(points: Sequence[Point]) -> list[list[Point]]:
    """The stretches between points that are not finite."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
