"""The state of a run, summed up from telemetry.json and events.jsonl. The exporter serves it as `/telemetry.json`."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Self

from pydantic import BaseModel

from monitoring.events import (
    EVENT_TYPES,
    REASONS,
    EventLine,
    Failed,
    Resized,
    State,
    Stopped,
    WorkersStarted,
    kinds_where,
)
from monitoring.telemetry import Number, Telemetry, WorkerRecord

INTERRUPTIONS = kinds_where(lambda event: event.INTERRUPTS)
ENDINGS = kinds_where(lambda event: event.ENDS_WORKERS)
STATES: dict[str, State] = {event.KIND: event.STATE for event in EVENT_TYPES if event.STATE}


class RunState(BaseModel):
    """The state of a run now."""

    run: str
    state: State
    telemetry: Telemetry | None
    """None until the first workers are up."""
    events: dict[str, int]
    """Lines of events.jsonl by kind. Every known kind is listed, so that its first event shows as a rise from 0."""
    restarts: dict[str, int]
    """Interruptions of the workers by reason. Every known reason is listed."""
    id: str = ""
    """`RunDirectory.id`."""
    time: Number = math.nan
    """Unix time at which the state was read. Every other time is given by the same clock."""
    nodes: list[str] = []
    """Address of the node of each rank, since the workers last started."""
    seconds_left: Number = math.nan
    """Estimated time to the last step."""

    @classmethod
    def of(cls, run: str, telemetry: Telemetry | None, events: Sequence[EventLine], id: str = "") -> Self:
        """Sum up a run from what its files hold. `id` is its `RunDirectory.id`."""
        kinds = Counter({event.KIND: 0 for event in EVENT_TYPES})
        kinds.update(event["event"] for event in events)
        kinds.update(telemetry.unwritten if telemetry else {})
        telemetry = idle_after_ending(telemetry, events)
        now = time.time()
        started = [event["workers"] for event in events if event["event"] == WorkersStarted.KIND]
        return cls(
            run=run,
            state=state_of(events),
            telemetry=telemetry,
            events=kinds,
            restarts=count_restarts(events),
            id=id,
            time=now,
            nodes=started[-1] if started else [],
            seconds_left=seconds_left(telemetry, events, now) if telemetry else math.nan,
        )

    @property
    def workers(self) -> dict[tuple[str, str], WorkerRecord]:
        """The latest record of each rank, by rank and node."""
        workers = self.telemetry.workers if self.telemetry else []
        return {(str(one.rank), self.nodes[one.rank] if one.rank < len(self.nodes) else ""): one for one in workers}


def seconds_left(telemetry: Telemetry, events: Sequence[EventLine], now: float) -> float:
    """Estimate the time to the last step: a run that has stood still a tenth of its time will do so again."""
    at_work = telemetry.counters.step_seconds.sum
    lost = sum(event.get("steps_lost", 0) for event in events) * telemetry.step_seconds
    share = 1 + (standstill_seconds(events, now) + lost) / at_work if at_work else 1
    return (telemetry.total_steps - telemetry.step) * telemetry.step_seconds * share


def standstill_seconds(events: Sequence[EventLine], now: float) -> float:
    """Sum the times from an interruption until workers are ready again. One clock, the launcher's, has written both."""
    total, since = 0.0, None
    for event in events:
        if since is None and event["event"] in (*INTERRUPTIONS, Resized.KIND):
            since = datetime.fromisoformat(event["time"]).timestamp()
        elif since is not None and event["event"] == WorkersStarted.KIND:
            seconds = datetime.fromisoformat(event["time"]).timestamp() - since
            total, since = total + max(0.0, seconds), None  # a clock may be set back
    return total + (max(0.0, now - since) if since is not None and state_of(events) == "running" else 0.0)


def state_of(events: Sequence[EventLine]) -> State:
    """Derive the state of a run from its events. A run whose launcher was killed counts as running."""
    states = [STATES[event["event"]] for event in events if event["event"] in STATES]
    return "finished" if "finished" in states else states[-1] if states else "not_started"


def idle_after_ending(telemetry: Telemetry | None, events: Sequence[EventLine]) -> Telemetry | None:
    """Return the telemetry, without workers and rates if the workers ended after it was written."""
    endings = [event["time"] for event in events if event["event"] in ENDINGS]
    if telemetry is None or not endings or datetime.fromisoformat(endings[-1]).timestamp() <= telemetry.time:
        return telemetry
    return telemetry.stopped()


def count_restarts(events: Sequence[EventLine]) -> Counter[str]:
    """Count the interruptions by reason. Events of other versions may lack a reason; their kind stands in for it."""
    counts = Counter({str(reason): 0 for reason in REASONS})
    counts.update(str(event.get("reason") or event["event"]) for event in events if event["event"] in INTERRUPTIONS)
    return counts


def interruptions_in_words(events: Sequence[EventLine]) -> str:
    """Say how often and why the workers were interrupted, the steps done twice, and how often the run ended early."""
    continued = _count_continued([event["event"] for event in events])
    ended = f"; ended early and continued {continued} time{'s' * (continued != 1)}" if continued else ""
    reasons = {reason.replace("_", " "): count for reason, count in count_restarts(events).items() if count}
    if resized := sum(event["event"] == Resized.KIND for event in events):
        reasons["resized"] = resized
    lost = sum(event.get("steps_lost", 0) for event in events)
    again = f"; {lost:,} step{'s' * (lost != 1)} trained again"
    if not reasons:
        return f"never interrupted{again * bool(lost)}{ended}"
    times = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    total = sum(reasons.values())
    return f"interrupted {total} time{'s' * (total != 1)} ({times}){again}{ended}"


def _count_continued(kinds: Sequence[str]) -> int:
    """Count the starts after an end of the job: one with an event, or a kill, which leaves none."""
    starts = [index for index, kind in enumerate(kinds) if kind == WorkersStarted.KIND]
    between = [set(kinds[first:second]) for first, second in pairwise(starts)]
    known = {*INTERRUPTIONS, Resized.KIND}
    return sum(bool({Stopped.KIND, Failed.KIND} & part) or not known & part for part in between)
