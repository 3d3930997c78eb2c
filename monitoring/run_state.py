"""The state of a run, summed up from telemetry.json and events.jsonl. The exporter serves it as `/telemetry.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Self

from pydantic import BaseModel

from monitoring.events import EVENT_TYPES, REASONS, EventLine, Resized, State, kinds_where
from monitoring.telemetry import Telemetry

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

    @classmethod
    def of(cls, run: str, telemetry: Telemetry | None, events: Sequence[EventLine]) -> Self:
        """Sum up a run from what its files hold."""
        kinds = Counter({event.KIND: 0 for event in EVENT_TYPES})
        kinds.update(event["event"] for event in events)
        kinds.update(telemetry.unwritten if telemetry else {})
        telemetry = idle_after_ending(telemetry, events)
        return cls(run=run, state=state_of(events), telemetry=telemetry, events=kinds, restarts=count_restarts(events))


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
    """Say how often and why the workers were interrupted, and how many steps were done twice."""
    reasons = {reason.replace("_", " "): count for reason, count in count_restarts(events).items() if count}
    if resized := sum(event["event"] == Resized.KIND for event in events):
        reasons["resized"] = resized
    if not reasons:
        return "never interrupted"
    lost = sum(event.get("steps_lost", 0) for event in events)
    times = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    total = sum(reasons.values())
    return f"interrupted {total} time{'s' * (total != 1)} ({times}); {lost:,} step{'s' * (lost != 1)} trained again"
