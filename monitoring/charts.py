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
    y_ticks = ticks(0.0, highest or 1.0, 5) if from_zero else ticks(lowest, highest, 5)
    frame = _Frame(width, height, (min(x_values), max(x_values)), (y_ticks[0], y_ticks[-1]))
    x_ticks = [x for x in ticks(*frame.x_range, width // 80) if frame.x_range[0] <= x <= frame.x_range[1]]
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'data-scale="{escape(frame.scale(x_name))}">',
        *(_band(frame, band) for band in bands),
        *(_y_tick(frame, y, number(y)) for y in y_ticks),
        *(_x_tick(frame, x, x_number(x)) for x in x_ticks),
        f'<text class="tick" x="{width - RIGHT}" y="{height - 1}" text-anchor="end">{escape(x_name)}</text>',
        *(_mark(frame, mark) for mark in marks),
        *(_stretch(frame, line, part) for line in lines for part in _unbroken(_thinned(line.points))),
        "</svg>",
    ]
    return Markup("".join(parts))


@dataclass(frozen=True)
class _Frame:
    """Size of a chart in pixels, and the ranges of its axes."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    @property
    def floor(self) -> int:
        return self.height - BOTTOM

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / ((high - low) or 1) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.floor - (value - low) / ((high - low) or 1) * (self.height - TOP - BOTTOM)

    def scale(self, x_name: str) -> str:
        """JSON for the page's script, which shows the values under the pointer."""
        x, y = [LEFT, self.width - RIGHT, *self.x_range], [self.floor, TOP, *self.y_range]
        return json.dumps({"x": x, "y": y, "xName": x_name})


def _band(frame: _Frame, band: Band) -> str:
    left, right = frame.x(band.start), frame.x(band.end)
    return (
        f'<rect class="band {band.color}" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
        f'height="{frame.floor - TOP}"/><text class="band-name {band.color}" x="{left + 6:.1f}" y="{TOP - 7}">'
        f"{escape(band.label)}</text>"
    )


def _y_tick(frame: _Frame, value: float, text: str) -> str:
    y = frame.y(value)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _x_tick(frame: _Frame, value: float, text: str) -> str:
    x = frame.x(value)
    return f'<text class="tick" x="{x:.1f}" y="{frame.floor + 18}" text-anchor="middle">{escape(text)}</text>'


def _mark(frame: _Frame, mark: Mark) -> str:
    x = frame.x(mark.x)
    shape = (
        f'<path d="M{x:.1f} {frame.floor}l-3.5 6h7z"/>'
        if mark.kind == "checkpoint"
        else f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.floor}"/>'
    )
    return f'<g class="mark {mark.kind}"><title>{escape(mark.label)}</title>{shape}</g>'


def _stretch(frame: _Frame, line: Line, points: Sequence[Point]) -> str:
    """An unbroken part of a line; a single point is a dot."""
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="dot {line.color}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5"/>'
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    style = f"line {line.color}{' faint' if line.faint else ''}"
    return f'<polyline class="{style}" points="{path}"><title>{escape(line.name)}</title></polyline>'


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
