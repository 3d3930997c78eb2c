"""report.html: the run at a glance, in one file that needs no network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from configs.load import dump_config, load_config
from configs.schema import RunConfig
from configs.units import format_count
from monitoring.charts import HALF, WIDE, Band, Line, Mark, Point, line_chart, smoothed
from monitoring.log import read_events, read_metrics
from monitoring.metrics import INTERRUPTIONS
from monitoring.progress import format_seconds
from monitoring.telemetry import Telemetry

REPORT = "report.html"
LOUD = (*INTERRUPTIONS, "failed")
"""Events shown as faults."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Figure:
    title: str
    chart: Markup
    note: str = ""
    keys: Sequence[Line] = ()
    wide: bool = False


def write_report(directory: Path) -> Path:
    """Write `report.html` of a run directory from its configuration, metrics, events and telemetry; returns its path.

    A run that has logged nothing yet gets a report that says so. Raises InputError where there is no config.yaml.
    """
    config = load_config(str(directory / "config.yaml"))
    rows, events = read_metrics(directory), read_events(directory)
    now = Telemetry.read(directory)
    state, state_text = _state(config, rows, events)
    page = render(
        "report.html",
        title=f"{config.name}: report",
        config=config,
        state=state,
        state_text=state_text,
        lead=_lead(config),
        tiles=_tiles(config, rows, events),
        figures=_figures(config, rows, events),
        events=[_event(event) for event in events],
        command=f"detour-train {directory / 'config.yaml'} --output {directory.with_name(directory.name + '-again')}",
        info=now.info if now else {},
        yaml=dump_config(config),
        version=version("detour-train"),
        now=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
    )
    path = directory / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def render(template: str, **values: Any) -> str:
    """A page of monitoring/pages; everything that is not Markup is escaped."""
    environment = Environment(
        loader=PackageLoader("monitoring", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**values)


def curve(rows: Sequence[Row], key: str) -> list[Point]:
    """(step, value) of one key; a null is not a number."""
    return [(row["step"], math.nan if row[key] is None else row[key]) for row in rows]


def _state(config: RunConfig, rows: Sequence[Row], events: Sequence[Row]) -> tuple[str, str]:
    kinds = [event["event"] for event in events]
    step = rows[-1]["step"] if rows else 0
    where = f"step {step:,} of {config.total_steps:,}"
    if "finished" in kinds:
        return "finished", "Finished"
    turns = [kind for kind in kinds if kind in ("started", "resumed", "preempted", "worker_failed")]
    states = {
        "started": ("running", f"Running, {where}"),
        "resumed": ("running", f"Running, {where}"),
        "preempted": ("stopped", f"Stopped early at {where}, everything saved"),
        "worker_failed": ("failed", f"Failed at {where}"),
    }
    return states[turns[-1]] if turns else ("stopped", "Not started")


def _lead(config: RunConfig) -> str:
    phases = " then ".join(
        f"{phase.objective.upper()} for {phase.length(config.tokens_per_step):,} steps" for phase in config.phases
    )
    model = config.model.size or config.model.init
    return (
        f"{model}, {phases}; {config.batch.sequences:,} sequences of {config.data.sequence_length:,} token slots "
        f"a step, peak learning rate {config.optimizer.lr:g}"
    )


def _tiles(config: RunConfig, rows: Sequence[Row], events: Sequence[Row]) -> list[Tile]:
    tiles = []
    for index, phase in enumerate(config.phases):
        losses = [y for _, y in smoothed(curve([row for row in rows if row["phase"] == index], "loss"))]
        value = f"{losses[-1]:.3f}" if losses else "-"
        note = f"from {losses[0]:.3f}, perplexity {_perplexity(losses[-1])}" if losses else "not reached"
        tiles.append(Tile(f"{phase.objective.upper()} loss", value, note))
    if rows:
        rate = _median([row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None])
        mfu = _median([row["mfu"] for row in rows if row["mfu"] is not None])
        tiles.append(Tile("Tokens", format_count(rows[-1]["tokens"]), f"in {rows[-1]['step']:,} steps"))
        tiles.append(Tile("Throughput", f"{format_count(rate)}/s", f"median tokens; MFU {mfu:.1%}"))
    if len(events) > 1:
        first, last = (datetime.fromisoformat(events[index]["time"]) for index in (0, -1))
        tiles.append(Tile("Time", format_seconds((last - first).total_seconds()), "from start to last event"))
    kinds = Counter(event["event"] for event in events)
    faults = sum(kinds[kind] for kind in INTERRUPTIONS)
    tiles.append(Tile("Interruptions", str(faults), f"{kinds['checkpoint_saved']} checkpoints saved"))
    return tiles


def _figures(config: RunConfig, rows: Sequence[Row], events: Sequence[Row]) -> list[Figure]:
    bands, marks = _bands(config, rows), _marks(config, rows, events)
    phases = [[row for row in rows if row["phase"] == index] for index in range(len(config.phases))]
    losses = [
        Line(f"{config.phases[index].objective} loss", points, config.phases[index].objective, faint)
        for index, part in enumerate(phases)
        for faint in (True, False)
        if (points := curve(part, "loss") if faint else smoothed(curve(part, "loss")))
    ]

    def figure(title: str, key: str, number: Any, note: str = "", from_zero: bool = True) -> Figure:
        line = Line(title, curve(rows, key), "ink")
        chart = line_chart(title, [line], number=number, bands=bands, marks=marks, from_zero=from_zero, size=HALF)
        return Figure(title, chart, note)

    loss = line_chart("Training loss", losses, number=lambda y: f"{y:g}", bands=bands, marks=marks, size=WIDE)
    waits = [(row["step"], row["data_wait_seconds"] / (row["step_seconds"] or math.nan)) for row in rows]
    data_wait = line_chart(
        "Data wait",
        [Line("data wait", waits, "ink")],
        number=lambda y: f"{y * 100:.3g} %",
        bands=bands,
        marks=marks,
        from_zero=True,
    )
    return [
        Figure("Loss", loss, "a step, and smoothed; triangles are checkpoints, red lines are faults", wide=True),
        figure("Learning rate", "learning_rate", lambda y: f"{y:.3g}"),
        figure("Throughput", "tokens_per_second", lambda y: format_count(y), "real tokens a second, all devices"),
        figure("Model FLOPs utilisation", "mfu", lambda y: f"{y * 100:.3g} %", "share of the devices' peak"),
        Figure("Data wait", data_wait, "share of a step spent waiting for its data"),
        figure("Gradient norm", "grad_norm", lambda y: f"{y:.3g}", "before clipping"),
        figure("Packing", "packing_ratio", lambda y: f"{y * 100:.3g} %", "real tokens in the token slots", False),
    ]


def _bands(config: RunConfig, rows: Sequence[Row]) -> list[Band]:
    """The phases as far as the run has come."""
    reached = rows[-1]["step"] if rows else 0
    bands: list[Band] = []
    start = 0
    for phase in config.phases:
        end = start + phase.length(config.tokens_per_step)
        if start < reached or not bands:
            bands.append(Band(start, min(end, reached), phase.objective.upper(), phase.objective))
        start = end
    return bands


def _marks(config: RunConfig, rows: Sequence[Row], events: Sequence[Row]) -> list[Mark]:
    reached = rows[-1]["step"] if rows else 0
    marks = []
    for event in events:
        kind, step = event["event"], event.get("step")
        if step is None or not 0 < step <= reached:
            continue
        if kind == "phase_started":
            marks.append(Mark(step, "switch", f"{event['objective'].upper()} from step {step + 1:,}"))
        elif kind == "checkpoint_saved":
            marks.append(Mark(step, "checkpoint", f"checkpoint at step {step:,}"))
        elif kind in LOUD:
            marks.append(Mark(step, "fault", f"{kind.replace('_', ' ')} at step {step:,}"))
    return marks


def _event(event: Row) -> Row:
    detail = ", ".join(
        f"{key} {value}" for key, value in event.items() if key not in ("time", "event", "step") and value is not None
    )
    return {
        "time": datetime.fromisoformat(event["time"]).strftime("%Y-%m-%d %H:%M:%S"),
        "kind": event["event"].replace("_", " "),
        "step": event.get("step", ""),
        "detail": detail,
        "bad": event["event"] in LOUD,
    }


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.4g}" if loss < 50 else "very large"


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else math.nan
