"""The rows that every benchmark prints, and writes with --json."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.files import write_json


@dataclass(frozen=True)
class Row:
    """One measurement and the value that it is compared with."""

    name: str
    ours: float
    peer: float
    """The other program's value, or a limit."""
    ratio: float
    """ours / peer."""
    bar: float | None
    """Goal for the ratio; None without a goal."""
    unit: str
    """Unit of `ours` and `peer`."""
    met: bool | None
    """Whether the ratio reaches the bar; None without a bar."""

    @classmethod
    def at_least(cls, name: str, ours: float, peer: float, bar: float | None, unit: str) -> Row:
        """Make a row in which more is better: the bar is the least ratio."""
        ratio = ours / peer
        return cls(name, ours, peer, ratio, bar, unit, None if bar is None else ratio >= bar)

    @classmethod
    def at_most(cls, name: str, ours: float, peer: float, bar: float | None, unit: str) -> Row:
        """Make a row in which less is better: the bar is the greatest ratio."""
        ratio = ours / peer
        return cls(name, ours, peer, ratio, bar, unit, None if bar is None else ratio <= bar)


def arguments(description: str | None, **flags: str) -> argparse.Namespace:
    """Parse the options `quick` and `json` of the command line, and flags of the benchmark with their help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: within 10 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    for name, explanation in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=explanation)
    return parser.parse_args()


def report(rows: Sequence[Row], file: Path | None) -> None:
    """Print the table, and write the rows to `file` if it is given."""
    width = max(len(row.name) for row in rows)
    machine, python = platform.processor() or platform.machine(), platform.python_version()
    print(f"{machine}, {os.cpu_count()} cores, Python {python}, load {os.getloadavg()[1]:.1f}")
    print(f"{'':<{width}}  {'ours':>12}  {'peer':>12}  {'ratio':>8}  {'bar':>6}")
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:g}"
        met = "" if row.met is None else "met" if row.met else "NOT MET"
        numbers = f"{row.ours:>12,.4g}  {row.peer:>12,.4g}  {row.ratio:>8.3g}  {bar:>6}"
        print(f"{row.name:<{width}}  {numbers}  {row.unit:<12} {met}")
    if file is not None:
        write(rows, file)


def write(rows: Sequence[Row], file: Path) -> None:
    """Write the rows as a JSON list."""
    write_json(file, [asdict(row) for row in rows])
