"""What every benchmark prints, and writes with --json."""

from __future__ import annotations

import argparse
import json
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement. None where there was nothing to measure with, or nothing to compare to."""

    name: str
    ours: float | None
    peer: float | None = None
    unit: str = ""
    bar: str | None = None
    """What is asked of `ratio`, or of `ours` where there is no peer, such as ">= 2" or "<= 0.03"."""
    ratio: float | None = field(init=False)
    met: bool | None = field(init=False)
    """None: not measured, or nothing is asked."""

    def __post_init__(self) -> None:
        ratio = self.ours / self.peer if self.ours is not None and self.peer else None
        object.__setattr__(self, "ratio", ratio)
        judged = self.ours if self.peer is None else ratio
        met = None
        if self.bar is not None and judged is not None:
            sign, number = self.bar.split()
            met = {">=": operator.ge, "<=": operator.le}[sign](judged, float(number))
        object.__setattr__(self, "met", met)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="end within 10 minutes on 2 cores")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    return made


def report(rows: Sequence[Row], file: Path | None) -> None:
    """Print the table; write the JSON where a file is named."""
    head = ("name", "ours", "peer", "ratio", "bar", "unit", "met")
    words = {None: "-", True: "yes", False: "NO"}
    lines = [
        (
            row.name,
            "not measured" if row.ours is None else f"{row.ours:,.4g}",
            "-" if row.peer is None else f"{row.peer:,.4g}",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            row.bar or "-",
            row.unit,
            words[row.met],
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    for line in [head, *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if file:
        file.write_text(json.dumps([{key: asdict(row)[key] for key in head} for row in rows], indent=1) + "\n")
