"""Charts as SVG files that need no style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import escape

from configs.files import write_atomically
from monitoring.charts import WIDE, Line

COLORS = ("#2460c4", "#c2560c", "#1d7f4f", "#8a3fb0", "#b0860b", "#0e8a96", "#c63472", "#61666f")
STYLE = "".join(f".c{index} {{ color: {color}; }} " for index, color in enumerate(COLORS)) + (
    ".ink { color: #1b1d21; } text { font: 12px sans-serif; fill: #61666f; } .title { font-weight: 600; }"
    " text.key { fill: currentColor; } .grid { stroke: #ecece8; } .dot { fill: currentColor; }"
    " .line { fill: none; stroke: currentColor; stroke-width: 2; } .line.faint { stroke-width: 1; opacity: 0.6; }"
)
CAPTION_HEIGHT = 48
"""Pixels above a chart for its title and key."""


def write_figure(path: Path, charts: Sequence[tuple[str, Sequence[Line], str]]) -> None:
    """Write charts below each other as one SVG file.

    Args:
        path: File to write.
        charts: Title, lines for the key, and wide `<svg>` of each chart.
    """
    width, height = WIDE
    parts = []
    for index, (title, lines, chart) in enumerate(charts):
        top = index * (height + CAPTION_HEIGHT)
        parts.append(f'<text class="title" x="8" y="{top + 18}">{escape(title)}</text>')
        x = 8
        for line in lines:
            parts.append(f'<text class="key {line.color}" x="{x}" y="{top + 36}">{escape(line.name)}</text>')
            x += 9 * len(line.name) + 16
        tag = f'<svg x="0" y="{top + CAPTION_HEIGHT}" width="{width}" height="{height}"'
        parts.append(str(chart).replace("<svg", tag, 1))  # str, because Markup.replace would escape the tag
    total = len(charts) * (height + CAPTION_HEIGHT)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}">'
    page = f'{head}<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    write_atomically(path, page)
