"""`detour compare`: runs side by side, as a table and as a page of curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.errors import InputError
from configs.files import file_sha256, write_atomically
from configs.units import format_count
from monitoring.charts import HALF, NOTHING, WIDE, Line, Point, line_chart, smoothed
from monitoring.formatting import format_seconds, percent, plain, scientific
from monitoring.page import Figure, render
from monitoring.run_directory import RunDirectory
from monitoring.run_files import RunFiles, curve, open_run

MOST_RUNS = 64
COLORS = 8
"""Colours of the charts. Runs beyond them repeat the colours in faint lines."""
OTHER_TOKENIZERS = "tokenizer (losses of different ones do not compare; bits per byte do)"

Cell = str


def compare(directories: Sequence[Path], out: Path, console: Console | None = None) -> Path:
    """Print a table of the runs, write a page of their curves, and return its path.

    Args:
        directories: Two to 64 run directories.
        out: The page.
        console: Where the table is printed.

    Raises:
        InputError: There are too few or too many directories, or one of them holds no run.
    """
    if not 2 <= len(directories) <= MOST_RUNS:
        raise InputError(
            f"compare takes 2 to {MOST_RUNS} run directories, got {len(directories)}", code="number-of-runs"
        )
    runs = [open_run(directory) for directory in directories]
    names = _names(runs)
    columns = _columns(runs)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for title, cells in columns.items():
        table.add_row(title, *cells)
    (console or Console()).print(table)
    page = render(
        "compare.html",
        title="Comparison: " + ", ".join(names),
        names=names,
        states=[run.state for run in runs],
        columns=columns,
        figures=_figures(runs, names),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Names that tell the runs apart: the run's name, with its directory or its path where names are equal."""
    names = [run.config.name for run in runs]
    for location in (lambda run: run.directory.absolute().name, lambda run: str(run.directory)):
        longer_names = [f"{run.config.name} ({location(run)})" for run in runs]
        names = [name if names.count(name) == 1 else longer for name, longer in zip(names, longer_names, strict=True)]
    return names


def _columns(runs: Sequence[RunFiles]) -> dict[str, list[Cell]]:
    """Rows of the table: title -> one cell per run."""
    rows: dict[str, Callable[[RunFiles], Cell]] = {
        "model": lambda run: str(run.info.get("model", run.config.model.size or run.config.model.init)),
        OTHER_TOKENIZERS: lambda run: run.config.tokenizer,
        "phases": lambda run: " then ".join(phase.objective_name.upper() for phase in run.config.phases),
        "precision": lambda run: str(run.info.get("precision", run.config.precision)),
        "nodes": lambda run: str(run.info.get("nodes", run.config.cluster.nodes)),
        "steps": lambda run: f"{run.step:,} of {run.config.total_steps:,}",
        "tokens": lambda run: format_count(run.rows[-1]["tokens"]) if run.rows else "-",
        "last CLM loss": lambda run: _last_loss(run, "clm"),
        "last MLM loss": lambda run: _last_loss(run, "mlm"),
        "held-out MLM loss": lambda run: _last(run.evaluations("mlm")),
        "last CLM bits per byte": _last_bits,
        "held-out CLM bits per byte": lambda run: _last(run.evaluations("clm", "eval_bits_per_byte")),
        "tokens per second": lambda run: _number(run.median("tokens_per_second"), format_count),
        "per device": lambda run: _number(_per_device(run), format_count),
        "scaling efficiency": lambda run: _number(scaling_efficiency(run, runs), percent),
        "MFU": lambda run: _number(run.median("mfu"), percent),
        "waiting for data": lambda run: _number(_wait_share(run), percent),
        "interruptions": lambda run: str(run.interruptions),
        "time": lambda run: format_seconds(run.seconds),
    }
    if len({_devices(run) for run in runs} - {None}) < 2:
        del rows["scaling efficiency"]  # nothing was scaled
    if len({_tokenizer(run) for run in runs}) < 2:
        del rows[OTHER_TOKENIZERS]
    return {title: [cell(run) for run in runs] for title, cell in rows.items()}


def _figures(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Figure]:
    """Charts of all runs. The first has the legend; a chart without data is left out."""

    def figure(
        title: str,
        lines: Callable[[RunFiles], list[Point]],
        number: Callable[[float], str],
        note: str,
        wide: bool = False,
        from_zero: bool = False,
    ) -> Figure:
        drawn = [
            Line(name, lines(run), f"c{index % COLORS}", faint=index >= COLORS)
            for index, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        chart = line_chart(
            title,
            drawn,
            number=number,
            x_name="tokens",
            x_number=format_count,
            from_zero=from_zero,
            size=WIDE if wide else HALF,
        )
        return Figure(title, chart, note, drawn if wide else (), wide)

    figures = [
        figure("Training loss", _losses, plain, "smoothed; a jump is the switch of objective", wide=True),
        figure("Masked loss from the switch", _last_phase, plain, "the last MLM phase, over its own tokens"),
        figure("Held-out masked loss", _held_out, plain, "over the tokens trained on"),
        figure(
            "Throughput",
            lambda run: smoothed(_by_tokens(run, "tokens_per_second")),
            format_count,
            "tokens per second, all devices",
            from_zero=True,
        ),
        figure(
            "Model FLOPs utilisation",
            lambda run: smoothed(_by_tokens(run, "mfu")),
            percent,
            "share of the devices' peak",
            from_zero=True,
        ),
        figure("Learning rate", lambda run: _by_tokens(run, "learning_rate"), scientific, "", from_zero=True),
        figure(
            "Gradient norm",
            lambda run: smoothed(_by_tokens(run, "grad_norm")),
            plain,
            "before clipping",
            from_zero=True,
        ),
    ]
    return [entry for entry in figures if entry.chart != NOTHING]


def _losses(run: RunFiles) -> list[Point]:
    """Training loss, smoothed per phase, with a gap at each switch."""
    points: list[Point] = []
    for index in range(len(run.config.phases)):
        part = smoothed(curve(run.phase(index), "loss", "tokens"))
        points += [(part[0][0], math.nan), *part] if part else []
    return points


def _last_phase(run: RunFiles) -> list[Point]:
    last = len(run.config.phases) - 1
    if run.config.phases[last].objective_name != "mlm":
        return []
    rows = run.phase(last)
    start = max((row["tokens"] for row in run.rows if row["phase"] < last), default=0)
    return [(x - start, y) for x, y in smoothed(curve(rows, "loss", "tokens"))]


def _held_out(run: RunFiles) -> list[Point]:
    tokens = {row["step"]: row["tokens"] for row in run.rows}
    return [(tokens[int(step)], loss) for step, loss in run.evaluations("mlm")]


def _by_tokens(run: RunFiles, key: str) -> list[Point]:
    return curve(run.rows, key, "tokens")


def _last_loss(run: RunFiles, objective: str) -> Cell:
    return _last(smoothed(run.losses(objective)))


def _last_bits(run: RunFiles) -> Cell:
    """CLM loss in bits per byte, which compares runs with different tokenizers; runs of 0.1.0 did not log it."""
    rows = [row for row in run.rows if row["objective"] == "clm" and "bits_per_byte" in row]
    return _last(smoothed(curve(rows, "bits_per_byte")))


def _last(points: Sequence[Point]) -> Cell:
    return _number(points[-1][1], lambda y: f"{y:.3f}") if points else "-"


def _tokenizer(run: RunFiles) -> str:
    """Identify the run's tokenizer: by the content of its copy, or its name before there is a copy."""
    copy = RunDirectory(run.directory).tokenizer / "tokenizer.json"
    return file_sha256(copy) if copy.is_file() else run.config.tokenizer


def _devices(run: RunFiles) -> int | None:
    now = run.now
    if now is None or not now.tokens_per_second_per_device:
        return None
    return round(now.tokens_per_second / now.tokens_per_second_per_device)


def _per_device(run: RunFiles, objective: str | None = None) -> float:
    """Median tokens per second per device; with an objective, over its steps alone."""
    now = run.now
    if now is None or not now.tokens_per_second:
        return math.nan
    share = now.tokens_per_second_per_device / now.tokens_per_second
    return run.median("tokens_per_second", objective) * share


def scaling_efficiency(run: RunFiles, runs: Sequence[RunFiles]) -> float:
    """Throughput per device, as a share of the best run of the same model and precision.

    Only steps of the run's last objective count, because causal and masked steps take different times.
    """
    if not run.rows:
        return math.nan
    objective = run.rows[-1]["objective"]

    def group(run: RunFiles) -> tuple[object, object]:
        return run.info.get("model"), run.info.get("precision")

    speeds = [_per_device(other, objective) for other in runs if group(other) == group(run)]
    return _per_device(run, objective) / max((speed for speed in speeds if math.isfinite(speed)), default=math.nan)


def _wait_share(run: RunFiles) -> float:
    seconds = run.median("step_seconds")
    return run.median("data_wait_seconds") / seconds if seconds else math.nan


def _number(value: float, number: Callable[[float], str]) -> Cell:
    return number(value) if math.isfinite(value) else "-"
