"""The result of `detour audit` as report and model card show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring.run_directory import RunDirectory


@dataclass(frozen=True)
class Memorisation:
    """Exposure of a run's canaries as text and table."""

    note: str
    """Sentences about the measurement, or about its absence."""
    columns: tuple[str, ...] = ()
    """Titles of the table; empty without an audit."""
    rows: tuple[tuple[str, ...], ...] = ()


def memorisation(directory: Path) -> Memorisation | None:
    """Read the canaries and the audit of a run directory; None if the run has no canaries."""
    files = RunDirectory(directory)
    if not files.canaries.is_file():
        return None
    try:
        sources = json.loads(files.canaries.read_bytes())["sources"]
        planted = sum(bool(canary["copies"]) for source in sources.values() for canary in source["canaries"])
        about = f"{planted:,} random secrets (canaries) were planted in the training text"
    except (ValueError, KeyError, TypeError, AttributeError):
        about = "Random secrets (canaries) were planted in the training text"
    missing = Memorisation(f"{about}. What the model memorised of them was not measured; `detour audit` measures it.")
    try:
        audit = json.loads(files.audit.read_bytes())
        copies = sorted({int(group["copies"]) for row in audit["rows"] for group in row["groups"]})
        rows = tuple(_row(row, copies) for row in audit["rows"])
        note = (
            f"{about}. Exposure is measured in bits: {audit['expected_bits']:.2f} on average for a secret that the "
            f"model never saw, and at most {audit['ceiling_bits']:.2f} by ranks among {audit['candidates']:,} random "
            "candidates. Intervals are at 95 %, over the canaries."
        )
        note += "".join(f" {line}" for line in audit["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return missing
    return Memorisation(note, ("after", "attack", *map(copies_title, copies)), rows)


def copies_title(copies: int) -> str:
    """Title of the column of the canaries with `copies` copies."""
    return f"{copies} {'copy' if copies == 1 else 'copies'}" if copies else "never planted"


def exposure_cell(group: Mapping[str, Any]) -> str:
    """Exposure of a group of canaries with its interval, for people; a lower bound if all of them are ranked first."""
    text = f"{group['mean']:.2f}"
    if group.get("first") == group["canaries"]:
        return f"{text} or more"
    return text if group["low"] is None else f"{text} ({group['low']:.2f} to {group['high']:.2f})"


def _row(row: Mapping[str, Any], copies: list[int]) -> tuple[str, ...]:
    cells = {int(group["copies"]): exposure_cell(group) for group in row["groups"]}
    return (
        f"step {row['step']:,} ({row['phase']})",
        row["objective"].upper(),
        *(cells.get(count, "-") for count in copies),
    )
