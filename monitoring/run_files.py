"""The contents of a run directory, read once."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.schema import RunConfig
from monitoring.charts import Point
from monitoring.events import State
from monitoring.log import count_metrics, iterate_metrics, read_events
from monitoring.run_directory import require_run
from monitoring.run_state import INTERRUPTIONS, state_of
from monitoring.telemetry import Telemetry

Row = dict[str, Any]
"""A line of metrics.jsonl or events.jsonl."""
MOST_ROWS = 20_000
"""Most logged steps held in memory; a longer run is thinned."""


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory."""

    directory: Path
    config: RunConfig
    rows: list[Row]
    """Lines of metrics.jsonl; of a long run a part (`read_steps`)."""
    events: list[Row]
    """Lines of events.jsonl."""
    now: Telemetry | None
    """Latest telemetry; None before the first."""

    @property
    def info(self) -> dict[str, str | int | float]:
        """Labels that describe the run; empty before the first telemetry."""
        return self.now.info if self.now else {}

    @property
    def step(self) -> int:
        """The last logged step; 0 before the first."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @cached_property
    def kinds(self) -> Counter[str]:
        """Number of events by kind."""
        return Counter(event["event"] for event in self.events)

    @property
    def interruptions(self) -> int:
        """Number of times that the workers were interrupted."""
        return sum(self.kinds[kind] for kind in INTERRUPTIONS)

    @property
    def state(self) -> State:
        """State of the run."""
        return state_of(self.events)

    @property
    def seconds(self) -> float:
        """Wall time from the first event to the last. A clock that is set back takes nothing away."""
        times = [datetime.fromisoformat(event["time"]) for event in self.events]
        return sum(max(0.0, (after - before).total_seconds()) for before, after in itertools.pairwise(times))

    def phase(self, index: int) -> list[Row]:
        """Logged steps of a phase."""
        return [row for row in self.rows if row["phase"] == index]

    def median(self, key: str, objective: str | None = None) -> float:
        """Median of the logged values, or of the values of one objective; NaN without values."""
        rows = [row for row in self.rows if objective in (None, row["objective"])]
        values = [row[key] for row in rows if row[key] is not None]
        return statistics.median(values) if values else math.nan

    def losses(self, objective: str) -> list[Point]:
        """Points (step, training loss) of an objective, over the phases that have it alone or in a mixture."""
        by_step = {row["step"]: row.get("losses") or {row["objective"]: row["loss"]} for row in self.rows}
        points = ((step, losses.get(objective)) for step, losses in by_step.items())
        return [(step, loss) for step, loss in points if loss is not None]

    def evaluations(self, objective: str, key: str = "eval_loss") -> list[Point]:
        """Points (step, held-out loss) of an objective; with key `eval_accuracy`, the held-out accuracy."""
        held_out = [(row["step"], row[key].get(objective)) for row in self.rows if row.get(key)]
        return [(step, math.nan if value is None else value) for step, value in held_out]


def open_run(directory: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        InputError: The directory holds no run.
    """
    config = require_run(directory).config
    return RunFiles(
        directory, load_config(str(config)), read_steps(directory), read_events(directory), Telemetry.read(directory)
    )


def read_steps(directory: Path, most: int = MOST_ROWS) -> list[Row]:
    """Read the logged steps of a run, in order; of a run with more than `most` lines a part that shows the same curves.

    Of each stretch of lines it keeps both ends, the lowest and the highest loss and the largest gradient norm; and it
    keeps every evaluation and both ends of each phase. So no peak and no held-out value is lost.
    """
    total = count_metrics(directory)
    if total <= most:
        return list(iterate_metrics(directory))
    stretch = math.ceil(5 * total / most)
    rows: list[Row] = []
    lines, phase = iterate_metrics(directory), None
    while part := list(itertools.islice(lines, stretch)):
        low = [math.inf if row["loss"] is None else row["loss"] for row in part]
        high = [-math.inf if row["loss"] is None else row["loss"] for row in part]
        norms = [-math.inf if row["grad_norm"] is None else row["grad_norm"] for row in part]
        kept = {0, len(part) - 1, low.index(min(low)), high.index(max(high)), norms.index(max(norms))}
        for index, row in enumerate(part):
            if row["phase"] != phase:
                kept |= {index, max(0, index - 1)}
            elif row.get("eval_loss"):
                kept.add(index)
            phase = row["phase"]
        rows += [part[index] for index in sorted(kept)]
    return rows


def curve(rows: Sequence[Row], key: str, x: str = "step") -> list[Point]:
    """Points (x, value) of one key; null becomes NaN."""
    return [(row[x], math.nan if row[key] is None else row[key]) for row in rows]
