"""A run without a model: the real Recorder, fed with invented steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.load import dump_config, validate
from configs.schema import RunConfig
from monitoring.events import Failed, Finished, Resized, Resumed, Started, Stopped, WorkerFailed
from monitoring.recorder import Recorder, StepRecord
from monitoring.run_directory import RunDirectory
from monitoring.telemetry import WorkerRecord

TREE: dict[str, Any] = {
    "name": "toy",
    "model": {"size": "tiny"},
    "tokenizer": "package://tokenizer/modernbert",
    "data": {"sequence_length": 256, "streams": 2, "sources": [{"name": "notes", "shards": "shards/notes"}]},
    "batch": {"sequences": 4},
    "phases": [{"objective": "clm", "steps": 20}, {"objective": "mlm", "steps": 10}],
    "monitoring": {"every": "4 steps"},
}
INFO: dict[str, str | int | float] = {"model": "tiny", "precision": "fp32", "nodes": 1, "workers": 2}

STARTED = Started(step=0, precision="fp32")
RESUMED = Resumed(step=0, precision="fp32")
DIED = WorkerFailed(step=0, reason="died", rank=1, detail="exit by signal 9")
RESIZED = Resized(step=0)
STOPPED = Stopped(step=0, reason="signal")
FAILED = Failed(step=0, detail="no space left")
FINISHED = Finished(step=0)


def make_config(**changes: Any) -> RunConfig:
    return validate(RunConfig, TREE | changes, "toy")


def make_record(config: RunConfig, step: int, ranks: int = 2, **changes: Any) -> StepRecord:
    """A step whose numbers depend on its number alone."""
    first = config.spans[0].last
    phase = int(step > first)
    seconds = 0.2 + 0.01 * (step % 5)
    loss = 10.0 * math.exp(-step / 20) + 1
    mixed = isinstance(config.phases[phase].objective, dict)
    values: dict[str, Any] = {
        "step": step,
        "phase": phase,
        "objective": config.phases[phase].objective_name,
        "loss": loss,
        "losses": {"clm": loss + 1, "mlm": loss - 0.5} if mixed else None,
        "objective_tokens": {"clm": 300, "mlm": 600 + step} if mixed else None,
        "bits_per_byte": 3.0 * math.exp(-step / 20) + 0.3,
        "tokens": 900 + step,
        "learning_rate": 1e-3 * min(1, step / 5),
        "grad_norm": 1.0 + 1 / step,
        "gradient_norms": {"embeddings": 0.5, **{str(layer): 0.1 + layer / step for layer in range(4)}, "head": 0.2},
        "step_seconds": seconds,
        "data_wait_seconds": 0.002,
        "flops": 1e9,
        "packing_ratio": 0.9,
        "epochs": {"notes": step // 12},
        "drawn": {"notes": (910 * step, 3 * step, step // 10)},
        "eval_loss": {"clm": 9.0 * math.exp(-step / 100) + 2.5, "mlm": 9.0 * math.exp(-step / 300) + 2}
        if step % 20 == 0
        else None,
        "eval_accuracy": {"clm": 0.3, "mlm": 0.5 - 0.4 * math.exp(-step / 300)} if step % 20 == 0 else None,
        "eval_bits_per_byte": {"clm": 1.2, "mlm": 0.9} if step % 20 == 0 else None,
        "workers": [WorkerRecord(rank, seconds + 0.001 * rank, 10**9 + rank) for rank in range(ranks)],
    }
    return StepRecord(**(values | changes))


def make_recorder(directory: Path, config: RunConfig, state: dict[str, Any] | None = None, step: int = 0) -> Recorder:
    directory.mkdir(parents=True, exist_ok=True)
    RunDirectory(directory).config.write_text(dump_config(config), encoding="utf-8")
    return Recorder(directory, config, INFO, devices=2, peak_flops=1e11, state=state, step=step)


def drive(recorder: Recorder, config: RunConfig, steps: Iterable[int], ranks: int = 2) -> None:
    for step in steps:
        recorder.step(make_record(config, step, ranks))
