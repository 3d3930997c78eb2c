"""The rows every benchmark prints, and writes with --json."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement beside what it is measured against."""

    name: str
    ours: float
    peer: float
    ratio: float
    """As the line defines it; what the bar is about."""
    bar: float | None
    """None where nothing is promised."""
    unit: str
    """Of ours and peer."""
    met: bool | None

    @classmethod
    def at_least(cls, name: str, ours: float, peer: float, bar: float | None, unit: str) -> Row:
        """More is better: ratio = ours / peer, and the bar is its least value."""
        ratio = ours / peer
        return cls(name, ours, peer, ratio, bar, unit, None if bar is None else ratio >= bar)

    @classmethod
    def at_most(cls, name: str, ours: float, peer: float, bar: float | None, unit: str) -> Row:
        """Less is better: ratio = ours / peer, and the bar is its greatest value."""
        ratio = ours / peer
        return cls(name, ours, peer, ratio, bar, unit, None if bar is None else ratio <= bar)


def arguments(description: str | None) -> argparse.Namespace:
    """`quick` and `json` of the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: within 10 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    return parser.parse_args()


def report(rows: Sequence[Row], file: Path | None) -> None:
    """Print the table; write it to `file`, if one is given, as the list of rows."""
    width = max(len(row.name) for row in rows)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{'':<{width}}  {'ours':>12}  {'peer':>12}  {'ratio':>8}  {'bar':>6}")
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:g}"
        met = "" if row.met is None else "met" if row.met else "NOT MET"
        numbers = f"{row.ours:>12,.4g}  {row.peer:>12,.4g}  {row.ratio:>8.3g}  {bar:>6}"
        print(f"{row.name:<{width}}  {numbers}  {row.unit:<12} {met}")
    if file is not None:
        write(rows, file)


def write(rows: Sequence[Row], file: Path) -> None:
    """The list of rows, as JSON."""
    file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
