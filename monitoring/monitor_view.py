"""The screen of `detour monitor`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from configs.units import format_count
from monitoring.formatting import format_seconds
from monitoring.run_state import RunState
from monitoring.telemetry import Telemetry, WorkerRecord

SPARK_WIDTH = 48
"""Characters of the curve of the losses."""
LONG_SECONDS = 300.0
"""Time since the last step that is shown in yellow, because a person should look then."""
COLORS = {"clm": "dark_orange", "mlm": "dodger_blue1"}


@dataclass(frozen=True)
class View:
    """The contents of the screen."""

    run: RunState
    losses: Sequence[float] = ()
    """Losses of the current phase, oldest first."""

    @property
    def ended(self) -> bool:
        """Whether the run has ended."""
        return self.run.state in ("finished", "stopped", "failed")

    @property
    def time(self) -> float:
        """Now, by the clock of the times of the run."""
        return self.run.time if math.isfinite(self.run.time) else time.time()


def draw(view: View, alerts: list[str] | None) -> RenderableType:
    """Draw the whole screen. `alerts` are the names of firing alerts; None: no Prometheus answers."""
    now = view.run.telemetry
    if now is None:
        words = f"the run has {view.run.state}; no step is on record" if view.ended else "workers are starting"
        return Panel(Text(words, style="dim"), title="detour", title_align="left")
    color = COLORS.get(now.objective, "white")
    loss = Text.assemble((f"{now.loss.get(now.objective, math.nan):.3f}  ", "bold"), (sparkline(view.losses), color))
    rows: dict[str, RenderableType] = {
        "loss": loss,
        "speed": _join(
            f"{format_count(_mean_rate(now) if view.ended else now.tokens_per_second)} tokens/s",
            f"{now.step_seconds:.3g} s per step",
            f"MFU {now.mfu:.1%}" if math.isfinite(now.mfu) and not view.ended else "",
            f"{_wait_share(now):.1%} waiting for data",
        ),
        "training": _join(
            f"{format_count(sum(now.counters.tokens.values()))} tokens",
            f"learning rate {now.learning_rate:.3g}",
            f"gradient norm {now.grad_norm:.3g}",
            f"packing {now.packing_ratio:.1%}",
        ),
        "last step": _last_step(now, view.time, view.ended),
        "ranks": Text(_ranks(now.workers)),
        "checkpoint": Text(_checkpoint(now, view.time)),
        "restarts": _restarts(view.run.restarts),
        "alerts": _alert_text(alerts),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=10)
    table.add_column(ratio=1)
    for name, value in rows.items():
        table.add_row(name, value)
    left = f"{format_seconds(view.run.seconds_left)} left"
    ending = (view.run.state, "bold red" if view.run.state == "failed" else "bold") if view.ended else left
    head = Table.grid(expand=True)
    head.add_column()
    head.add_column(justify="right")
    phase = f"phase {now.phase + 1} of {len(now.objectives)}: {now.objective}"
    progress = Text.assemble(f"step {now.step:,} of {now.total_steps:,} · ", ending)
    head.add_row(Text(phase, style=f"bold {color}"), progress)
    bar = ProgressBar(total=now.total_steps, completed=now.step, complete_style=color, finished_style="green")
    return Panel(
        Group(head, bar, Text(), table), title=f"[bold]{now.run}[/]", title_align="left", padding=(1, 2), width=96
    )


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Draw values as block characters, the mean of one stretch per character and the lowest at the bottom."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[round((mean - low) / ((high - low) or 1) * (len(blocks) - 1))] for mean in means)


def _alert_text(alerts: list[str] | None) -> Text:
    if alerts is None:
        return Text("not known: no Prometheus answers", style="dim")
    return Text(", ".join(alerts), style="bold red") if alerts else Text("none", style="green")


def _restarts(reasons: dict[str, int]) -> Text:
    happened = [f"{count} {reason.replace('_', ' ')}" for reason, count in reasons.items() if count]
    return Text(", ".join(happened), style="yellow") if happened else Text("none", style="green")


def _last_step(now: Telemetry, clock: float, ended: bool) -> Text:
    since = now.step_time or now.resume_time
    ago = clock - since if since else math.nan
    return Text(f"{format_seconds(ago)} ago", style="yellow" if ago > LONG_SECONDS and not ended else "")


def _checkpoint(now: Telemetry, clock: float) -> str:
    if now.checkpoint_step is None:
        return "none yet"
    age = f", {format_seconds(clock - now.checkpoint_time)} ago" if now.checkpoint_time else ""
    return f"step {now.checkpoint_step:,}{age}"


def _ranks(workers: Sequence[WorkerRecord]) -> str:
    if not workers:
        return "none at work"
    times = [worker.step_seconds for worker in workers]
    pair = len(times) == 2  # the median of two ranks is their mean, which hides the slower rank
    usual, name = (min(times), "other") if pair else (statistics.median(times), "median")
    slowest = max(workers, key=lambda worker: worker.step_seconds)
    memory = max(worker.memory_bytes for worker in workers) / 2**30
    share = f"slowest is {slowest.rank} at {slowest.step_seconds / usual:.2f}x the {name}" if usual else ""
    return " · ".join(part for part in (str(len(workers)), share, f"at most {memory:.1f} GiB each") if part)


def _mean_rate(now: Telemetry) -> float:
    """Tokens per second over all steps, for a run that has ended and has no current rate."""
    seconds = now.counters.step_seconds.sum
    return sum(now.counters.tokens.values()) / seconds if seconds else 0.0


def _wait_share(now: Telemetry) -> float:
    seconds = now.counters.step_seconds.sum
    return now.counters.data_wait_seconds / seconds if seconds else 0.0


def _join(*parts: str) -> Text:
    return Text(" · ".join(part for part in parts if part))
