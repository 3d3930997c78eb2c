"""report.html: the run at a glance, in one file that needs no network."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from configs.files import write_atomically
from configs.load import dump_config
from configs.schema import Phase, RunConfig
from configs.units import format_count
from monitoring.audit import memorisation
from monitoring.charts import HALF, WIDE, Band, Line, Mark, Point, line_chart, smoothed
from monitoring.events import CheckpointSaved, PhaseStarted, kinds_where
from monitoring.formatting import format_seconds, percent, perplexity, plain, scientific
from monitoring.page import Figure, render
from monitoring.run_directory import RunDirectory
from monitoring.run_files import Row, RunFiles, curve, open_run

FAULTS = kinds_where(lambda event: event.FAULT)
MOST_EVENTS = 1000
"""Most events listed."""
MOST_MARKS = 200
"""Most marks of each kind on a chart; more would cover each other."""


@dataclass(frozen=True)
class Tile:
    """A number in large type."""

    name: str
    value: str
    note: str


def write_report(directory: Path) -> Path:
    """Write `report.html` from the files of a run directory, and return its path.

    The report of a run that has logged nothing yet says so.

    Raises:
        InputError: The directory holds no run.
    """
    run = open_run(directory)
    files = RunDirectory(directory)
    again = directory.with_name(f"{directory.name}-again")
    events = _shown(run.events)
    command = shlex.join(["detour-train", str(files.config), "--output", str(again)])
    page = render(
        "report.html",
        title=f"{run.config.name}: report",
        run=run,
        state=_state(run),
        lead=_lead(run),
        tiles=_tiles(run),
        figures=_figures(run),
        memorised=memorisation(directory),
        learned=[_learned(run, index) for index in range(len(run.config.phases))],
        events=[_event(event) for event in events],
        left_out=len(run.events) - len(events),
        command=f"cd {shlex.quote(str(Path.cwd()))} && {command}",  # relative paths of the configuration start here
        config_name=files.config.name,
        yaml=dump_config(run.config),
    )
    write_atomically(files.report, page)
    return files.report


def _state(run: RunFiles) -> str:
    step = f"step {run.step:,} of {run.config.total_steps:,}"
    # A launcher that was killed leaves no event, so the reader has to judge by the time.
    heard = f"; last heard of {datetime.fromtimestamp(run.now.time, UTC):%Y-%m-%d %H:%M} UTC" if run.now else ""
    return {
        "finished": "Finished",
        "running": f"Running, {step}{heard}",
        "stopped": f"Stopped early at {step}, everything saved",
        "failed": f"Failed at {step}",
        "not_started": "Not started",
    }[run.state]


def _lead(run: RunFiles) -> str:
    config = run.config
    phases = " then ".join(f"{span.phase.objective_name.upper()} for {span.steps:,} steps" for span in config.spans)
    return (
        f"{config.model.size or config.model.init}, {phases}; {_batches(config)} per step, "
        f"peak learning rate {config.optimizer.lr:g}"
        + (f"; branched off {config.origin.run} at step {config.origin.step:,}" if config.origin else "")
    )


def _batches(config: RunConfig) -> str:
    sizes = dict.fromkeys((span.sequences, span.sequence_length) for span in config.spans)
    return " then ".join(f"{sequences:,} sequences of {length:,} token slots" for sequences, length in sizes)


def _tiles(run: RunFiles) -> list[Tile]:
    tiles = []
    for index, phase in enumerate(run.config.phases):
        losses = [y for _, y in smoothed(curve(run.phase(index), "loss"))]
        value = f"{losses[-1]:.3f}" if losses else "-"
        note = f"from {losses[0]:.3f}{_fall(losses[0], losses[-1])}" if losses else "not reached"
        bits = [row["bits_per_byte"] for row in run.phase(index) if row.get("bits_per_byte") is not None]
        if bits:
            note += f"; {bits[-1]:.3f} bits per byte of the predicted text"
        tiles.append(Tile(f"{phase.objective_name.upper()} loss", value, note))
    if run.rows:
        mfu = run.median("mfu")
        tiles.append(Tile("Tokens", format_count(run.rows[-1]["tokens"]), f"in {run.step:,} steps"))
        note = f"median; MFU {mfu:.1%}" if math.isfinite(mfu) else "median"
        tiles.append(Tile("Tokens per second", format_count(run.median("tokens_per_second")), note))
    if run.seconds:
        tiles.append(Tile("Time", format_seconds(run.seconds), "from the first event to the last"))
    saved = run.kinds[CheckpointSaved.KIND]
    tiles.append(Tile("Interruptions", str(run.interruptions), f"{saved} checkpoint{'s' * (saved != 1)} saved"))
    return tiles


def _fall(first: float, last: float) -> str:
    if not first:
        return ""
    return f", {percent(abs(1 - last / first))} {'lower' if last <= first else 'higher'}"


def _figures(run: RunFiles) -> list[Figure]:
    bands, marks, rows = _bands(run), _marks(run), run.rows

    def figure(
        title: str, points: list[Point], number: Callable[[float], str], note: str = "", from_zero: bool = True
    ) -> Figure:
        line = Line(title, points, "ink")
        chart = line_chart(title, [line], number=number, bands=bands, marks=marks, from_zero=from_zero, size=HALF)
        return Figure(title, chart, note)

    losses, held_out = _loss_lines(run), _held_out_lines(run)
    waits = [(row["step"], row["data_wait_seconds"] / (row["step_seconds"] or math.nan)) for row in rows]
    figures = [
        Figure(
            "Training loss",
            line_chart("Training loss", losses, number=plain, bands=bands, marks=marks, size=WIDE),
            "logged steps, and smoothed; triangles are checkpoints, red lines are faults",
            wide=True,
        ),
        figure("Learning rate", curve(rows, "learning_rate"), scientific),
        figure("Throughput", curve(rows, "tokens_per_second"), format_count, "real tokens per second, all devices"),
        figure("Model FLOPs utilisation", curve(rows, "mfu"), percent, "share of the devices' peak"),
        figure("Data wait", waits, percent, "share of the step spent waiting for its data"),
        figure("Gradient norm", curve(rows, "grad_norm"), plain, _clipping(run)),
        figure("Packing", curve(rows, "packing_ratio"), percent, "real tokens in the token slots", False),
    ]
    if held_out:
        chart = line_chart("Held-out loss", held_out, number=plain, bands=bands, marks=marks)
        figures.insert(1, Figure("Held-out loss", chart, keys=held_out))
    if by_layer := _gradient_lines(run):
        chart = line_chart("Gradient norm by layer", by_layer, number=plain, x_name="layer", from_zero=True)
        note = "before clipping, median of the steps drawn per phase; the first layer is 0"
        figures.append(Figure("Gradient norm by layer", chart, note, keys=by_layer))
    if with_step := [event for event in run.events if event.get("step") is not None]:
        figures.append(
            Figure("Progress over time", _timeline(with_step), "steps of the events; a fall is work that is repeated")
        )
    return figures


def _clipping(run: RunFiles) -> str:
    """Return the note of the gradient norm: the share of clipped steps per phase."""
    last = {index + 1: rows[-1] for index in range(len(run.config.phases)) if (rows := run.phase(index))}
    told = [
        f"{percent(row['clipped_share'])} of the steps of phase {number}"
        for number, row in last.items()
        if "clipped_share" in row
    ]
    return f"before clipping; clipped in {', '.join(told)}" if told else "before clipping"


def _gradient_lines(run: RunFiles) -> list[Line]:
    """Return a line per phase: the median norm of each layer's gradient."""
    lines = []
    for index, phase in enumerate(run.config.phases):
        rows = [row["gradient_norms"] for row in run.phase(index) if row.get("gradient_norms")]
        layers = [part for part in rows[0] if part.isdecimal()] if rows else []
        norms = {layer: [row[layer] for row in rows if row[layer] is not None] for layer in layers}
        points = [(float(layer), statistics.median(values)) for layer, values in norms.items() if values]
        if points:
            lines.append(Line(f"{index + 1}. {phase.objective_name.upper()}", points, _color(phase)))
    return lines


def _loss_lines(run: RunFiles) -> list[Line]:
    lines = []
    for index, phase in enumerate(run.config.phases):
        points = curve(run.phase(index), "loss")
        name, color = phase.objective_name, _color(phase)
        lines.append(Line(f"{name} loss", points, color, faint=True))
        lines.append(Line(f"{name} loss, smoothed", smoothed(points), color))
    return lines


def _color(phase: Phase) -> str:
    """Class of the style sheet for a phase: the name of its objective, or ink for a mixture."""
    return phase.objective if isinstance(phase.objective, str) else "ink"


def _held_out_lines(run: RunFiles) -> list[Line]:
    lines = [Line(objective.upper(), run.evaluations(objective), objective) for objective in ("clm", "mlm")]
    return [line for line in lines if line.points]


def _timeline(events: Sequence[Row]) -> Markup:
    """Completed steps over wall time, from events that have a step."""
    start = datetime.fromisoformat(events[0]["time"])

    def minutes(event: Row) -> float:
        return (datetime.fromisoformat(event["time"]) - start).total_seconds() / 60

    points = [(minutes(event), float(event["step"])) for event in events]
    marks = [
        Mark(minutes(event), "fault" if event["event"] in FAULTS else "checkpoint", _name(event))
        for event in events
        if event["event"] in (*FAULTS, CheckpointSaved.KIND)
    ]
    return line_chart(
        "Progress over time",
        [Line("step", points, "ink")],
        number=lambda y: f"{y:,.0f}",
        x_name="minutes",
        x_number=plain,
        marks=_thinned(marks),
        from_zero=True,
    )


def _learned(run: RunFiles, index: int) -> Row:
    """First and last training loss, held-out loss and held-out accuracy of a phase's objective; a mixture's is MLM."""
    phase = run.config.phases[index]
    objective = phase.objective if isinstance(phase.objective, str) else "mlm"
    losses = [y for _, y in smoothed(curve(run.phase(index), "loss"))]
    steps = [row["step"] for row in run.phase(index)]
    held_out, accuracy = (
        [y for x, y in run.evaluations(objective, key) if steps and steps[0] <= x <= steps[-1] and math.isfinite(y)]
        for key in ("eval_loss", "eval_accuracy")
    )
    return {
        "phase": f"{index + 1}. {phase.objective_name.upper()}",
        "objective": _color(phase),
        "training": _change(losses),
        "training_perplexity": _change(losses, perplexity),
        "held_out": _change(held_out),
        "held_out_perplexity": _change(held_out, perplexity),
        "held_out_accuracy": _change(accuracy, percent),
    }


def _change(values: Sequence[float], number: Callable[[float], str] = lambda y: f"{y:.3f}") -> str:
    return f"{number(values[0])} → {number(values[-1])}" if values else "-"


def _bands(run: RunFiles) -> list[Band]:
    """Bands of the phases that the run has reached."""
    bands: list[Band] = []
    for span in run.config.spans:
        if span.first < run.step or not bands:
            name = span.phase.objective_name.upper()
            bands.append(Band(span.first, min(span.last, run.step), name, _color(span.phase)))
    return bands


def _marks(run: RunFiles) -> list[Mark]:
    kinds = {PhaseStarted.KIND: "switch", CheckpointSaved.KIND: "checkpoint"} | dict.fromkeys(FAULTS, "fault")
    return _thinned(
        [
            Mark(event["step"], kinds[event["event"]], _name(event))
            for event in run.events
            if event["event"] in kinds and 0 < (event.get("step") or 0) <= run.step
        ]
    )


def _thinned(marks: Sequence[Mark]) -> list[Mark]:
    """Keep at most MOST_MARKS of each kind, evenly over the run."""
    kept: list[Mark] = []
    for kind in {mark.kind: None for mark in marks}:
        one_kind = [mark for mark in marks if mark.kind == kind]
        kept += one_kind[:: math.ceil(len(one_kind) / MOST_MARKS)]
    return kept


def _shown(events: Sequence[Row]) -> list[Row]:
    """Return the events to list: all of a usual run; of a long one the faults and the latest of the others."""
    if len(events) <= MOST_EVENTS:
        return list(events)
    half = MOST_EVENTS // 2
    faults = [index for index, event in enumerate(events) if event["event"] in FAULTS][-half:]
    others = [index for index, event in enumerate(events) if event["event"] not in FAULTS]
    ends = {*others[: half // 5], *others[-(half - half // 5) :]}
    return [events[index] for index in sorted({*faults, *ends})]


def _name(event: Row) -> str:
    return f"{event['event'].replace('_', ' ')} at step {event['step']:,}"


def _event(event: Row) -> Row:
    hidden = ("time", "event", "step")
    detail = (f"{key.replace('_', ' ')} {_words(value)}" for key, value in event.items() if key not in hidden)
    return {
        "time": datetime.fromisoformat(event["time"]).strftime("%Y-%m-%d %H:%M:%S"),
        "kind": event["event"].replace("_", " "),
        "step": event.get("step", ""),
        "detail": ", ".join(detail),
        "bad": event["event"] in FAULTS,
    }


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
