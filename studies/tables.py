"""Tables of a study as CSV and JSON files."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.files import write_atomically

_LATEX = re.compile(r"[&%$#_{}]")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that have the same keys as one CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def write_tables(path: Path, rows: Sequence[dict[str, Any]], *, csv: bool = True) -> None:
    """Write rows as PATH.csv, PATH.md and PATH.tex; nothing without rows."""
    if not rows:
        return
    if csv:
        write_csv(path.with_suffix(".csv"), rows)
    write_atomically(path.with_suffix(".md"), as_markdown(rows))
    write_atomically(path.with_suffix(".tex"), as_latex(rows))


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows that have the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def as_latex(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows that have the same keys as a LaTeX `tabular` with the rules of booktabs."""

    def line(cells: Sequence[Any]) -> str:
        return " & ".join(_LATEX.sub(r"\\\g<0>", str(cell)) for cell in cells) + r" \\"

    body = [line(list(row.values())) for row in rows]
    start = rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}"
    return "\n".join(
        [start, r"\toprule", line(list(rows[0])), r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    )


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON has not, by None; also inside dicts, lists and tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value
