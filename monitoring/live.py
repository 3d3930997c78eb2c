"""`detour monitor`: the live state of a run in the terminal, from its directory or from its metrics endpoint."""

from __future__ import annotations

import json
import math
import re
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.console import Console
from rich.live import Live

from configs.errors import InputError
from monitoring.log import EVENTS, METRICS, Follower
from monitoring.metrics import count_restarts, seen_after, state_of
from monitoring.screen import View, screen
from monitoring.telemetry import Counters, Histogram, Telemetry, WorkerRecord

REFRESH_SECONDS = 1.0
PATIENCE_SECONDS = 3.0
SILENCE_SECONDS = 30.0
"""Without an answer, after which a run is given up: one late answer is no end."""
PROMETHEUS = "http://127.0.0.1:9090"

UNREADABLE = (OSError, HTTPException, ValueError)
"""What a source raises that does not answer, or that is no run."""

Samples = dict[str, list[Sample]]


class Source(Protocol):
    """Where the state of a run is read. One of UNREADABLE where it cannot be."""

    def read(self) -> View: ...


class DirectorySource:
    """The files of a run directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._events, self._lines = Follower(directory / EVENTS), Follower(directory / METRICS)

    def read(self) -> View:
        events, lines = self._events.read(), self._lines.read()
        now = seen_after(events, Telemetry.read(self._directory))
        losses = {line["step"]: line["loss"] for line in lines if now and line["phase"] == now.phase}
        known = [loss for loss in losses.values() if loss is not None]
        return View(now, dict(count_restarts(events)), known, state_of(events))


@dataclass
class EndpointSource:
    """The metrics endpoint of a run. Its losses are those seen since the watching began."""

    url: str
    _phase: int = -1
    _losses: dict[int, float] = field(default_factory=dict)

    def read(self) -> View:
        with urlopen(self.url, timeout=PATIENCE_SECONDS) as answer:
            samples = parse_metrics(answer.read().decode())
        if not samples["detour_run_info"]:
            raise ValueError("no metrics of a run")
        now = telemetry_of(samples)
        finished = any(s.value for s in samples["detour_events_total"] if s.labels["event"] == "finished")
        reasons = {s.labels["reason"]: int(s.value) for s in samples["detour_launcher_restarts_total"]}
        if now is None:
            return View(None, reasons, [])
        if now.phase != self._phase:
            self._phase, self._losses = now.phase, {}
        if math.isfinite(loss := now.loss.get(now.objective, math.nan)):
            self._losses[now.step] = loss
        return View(now, reasons, list(self._losses.values()), "finished" if finished else "running")


def watch(target: str, prometheus: str = PROMETHEUS, once: bool = False, console: Console | None = None) -> None:
    """Show the run at `target`, a run directory or a metrics URL, until it ends or stops; Ctrl-C leaves it running.

    Args:
        target: Run directory, `http://host:port[/metrics]`, or `host:port`.
        prometheus: Asked for the alerts that fire; where it does not answer the screen says so.
        once: Print the state once and return; so does an output that is no terminal.

    Raises InputError where there is no run.
    """
    console = console or Console()
    source = open_source(target)
    try:
        view = source.read()
    except OSError as error:
        raise InputError(
            f"{target}: no answer ({error}); is the run alive, and its monitoring.address reachable?"
        ) from None
    except UNREADABLE as error:
        raise InputError(
            f"{target}: answers, but not as a run's metrics endpoint ({error}); a run prints its URL at its start"
        ) from None
    if once or not console.is_terminal:
        console.print(screen(view, _alerts(prometheus, view)))
        return
    try:
        with Live(screen(view, None), console=console, auto_refresh=False) as live:
            answered = time.monotonic()
            while time.monotonic() - answered < SILENCE_SECONDS:
                live.update(screen(view, _alerts(prometheus, view)), refresh=True)
                if view.ended:
                    return
                time.sleep(REFRESH_SECONDS)
                with suppress(*UNREADABLE):
                    view, answered = source.read(), time.monotonic()
        console.print(f"{target} has not answered for {SILENCE_SECONDS:.0f} s: the run has ended")
    except KeyboardInterrupt:
        return


def open_source(target: str) -> Source:
    """InputError for what is neither a run directory nor a URL."""
    if Path(target).is_dir():
        if not (Path(target) / "config.yaml").exists():
            raise InputError(f"{target}: not a run directory, it has no config.yaml")
        return DirectorySource(Path(target))
    if re.fullmatch(r"[\w.\-\[\]:]+:\d+", target):
        target = f"http://{target}"
    if not target.startswith(("http://", "https://")):
        raise InputError(f"{target}: neither a run directory nor a metrics URL such as http://127.0.0.1:9464")
    return EndpointSource(target if target.endswith("/metrics") else target.rstrip("/") + "/metrics")


def parse_metrics(text: str) -> Samples:
    """The samples of a scrape by name."""
    samples: Samples = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name].append(sample)
    return samples


def telemetry_of(samples: Samples) -> Telemetry | None:
    """The telemetry a scrape was made of, as far as it is shown; None before the first."""

    def one(name: str, default: float = math.nan) -> float:
        return samples[name][0].value if samples[name] else default

    phases = sorted(samples["detour_train_phase"], key=lambda sample: int(sample.labels["phase"]))
    if not phases:
        return None
    memory = {sample.labels["rank"]: sample.value for sample in samples["detour_worker_memory_bytes"]}
    steps = Histogram(
        bounds=(),
        counts=[],
        count=int(one("detour_train_step_seconds_count")),
        sum=one("detour_train_step_seconds_sum"),
    )
    return Telemetry(
        run=phases[0].labels["run"],
        info={key: value for key, value in samples["detour_run_info"][0].labels.items() if key != "run"},
        objectives=[sample.labels["objective"] for sample in phases],
        total_steps=int(one("detour_train_steps_planned")),
        step=int(one("detour_train_step")),
        step_time=one("detour_train_step_timestamp_seconds"),
        phase=next((index for index, sample in enumerate(phases) if sample.value == 1), 0),
        loss={sample.labels["objective"]: sample.value for sample in samples["detour_train_loss"]},
        learning_rate=one("detour_train_learning_rate"),
        grad_norm=one("detour_train_grad_norm"),
        tokens_per_second=one("detour_train_tokens_per_second", 0),
        mfu=one("detour_train_mfu_ratio"),
        step_seconds=steps.sum / steps.count if steps.count else math.nan,
        packing_ratio=one("detour_data_packing_ratio"),
        workers=[
            WorkerRecord(int(sample.labels["rank"]), sample.value, int(memory[sample.labels["rank"]]))
            for sample in samples["detour_worker_step_seconds"]
        ],
        checkpoint_step=int(one("detour_checkpoint_step")) if samples["detour_checkpoint_step"] else None,
        checkpoint_time=one("detour_checkpoint_timestamp_seconds") if samples["detour_checkpoint_step"] else None,
        counters=Counters(
            tokens={s.labels["objective"]: int(s.value) for s in samples["detour_train_tokens_total"]},
            data_wait_seconds=one("detour_train_data_wait_seconds_total"),
            step_seconds=steps,
        ),
    )


def _alerts(prometheus: str, view: View) -> list[str] | None:
    """Names of the run's firing alerts; None where Prometheus does not answer."""
    if view.now is None:
        return None
    query = f'ALERTS{{alertstate="firing",run={json.dumps(view.now.run)}}}'
    try:
        with urlopen(f"{prometheus}/api/v1/query?{urlencode({'query': query})}", timeout=PATIENCE_SECONDS) as answer:
            result = json.load(answer)["data"]["result"]
    except (*UNREADABLE, KeyError):
        return None
    return sorted({sample["metric"]["alertname"] for sample in result})
