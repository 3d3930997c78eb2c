"""Everything a finished or running run left in its directory, read once."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.load import load_config
from configs.schema import RunConfig
from monitoring.charts import Point
from monitoring.log import read_events, read_metrics
from monitoring.metrics import INTERRUPTIONS, State, state_of
from monitoring.telemetry import Telemetry

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The files of a run directory."""

    directory: Path
    config: RunConfig
    rows: list[Row]
    """Of metrics.jsonl."""
    events: list[Row]
    now: Telemetry | None

    @property
    def info(self) -> dict[str, str | int | float]:
        return self.now.info if self.now else {}

    @property
    def step(self) -> int:
        """The last logged one; 0 before the first."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @cached_property
    def kinds(self) -> Counter[str]:
        return Counter(event["event"] for event in self.events)

    @property
    def interruptions(self) -> int:
        return sum(self.kinds[kind] for kind in INTERRUPTIONS)

    @property
    def state(self) -> State:
        return state_of(self.events)

    @property
    def seconds(self) -> float:
        """Wall time from the first event to the last."""
        if len(self.events) < 2:
            return 0.0
        first, last = (datetime.fromisoformat(self.events[index]["time"]) for index in (0, -1))
        return (last - first).total_seconds()

    def phase(self, index: int) -> list[Row]:
        return [row for row in self.rows if row["phase"] == index]

    def median(self, key: str, objective: str | None = None) -> float:
        """Of the logged values, or those of one objective; NaN without any."""
        rows = [row for row in self.rows if objective in (None, row["objective"])]
        values = [row[key] for row in rows if row[key] is not None]
        return statistics.median(values) if values else math.nan

    def evaluations(self, objective: str, key: str = "eval_loss") -> list[Point]:
        """(step, held-out loss) of an objective; or accuracy, with key `eval_accuracy`."""
        held_out = [(row["step"], row[key].get(objective)) for row in self.rows if row.get(key)]
        return [(step, math.nan if value is None else value) for step, value in held_out]


def open_run(directory: Path) -> RunFiles:
    """InputError where there is no run."""
    if not (directory / "config.yaml").exists():
        raise InputError(f"{directory}: not a run directory, it has no config.yaml")
    return RunFiles(
        directory,
        load_config(str(directory / "config.yaml")),
        read_metrics(directory),
        read_events(directory),
        Telemetry.read(directory),
    )


def curve(rows: Sequence[Row], key: str, x: str = "step") -> list[Point]:
    """(x, value) of one key; a null is not a number."""
    return [(row[x], math.nan if row[key] is None else row[key]) for row in rows]
