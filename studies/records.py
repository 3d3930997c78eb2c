"""The record of a trial: what the seeds determine, what was measured, and what it was made with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import RunFailedError
from configs.versions import software
from monitoring.events import WorkersStarted
from monitoring.run_directory import RunDirectory
from monitoring.run_files import RunFiles
from studies.derived import parameters_of
from studies.measures import Measure, outcomes_of
from studies.plan import Study, Trial, decay_of


def record_path(output: Path, trial: Trial) -> Path:
    """Return the file of a trial's record."""
    return output / "records" / f"{trial_directory(output, trial).name}.json"


def trial_directory(output: Path, trial: Trial) -> Path:
    """Return the directory of a trial: one with its address, whatever it was named, else a new one."""
    trials = output / "trials"
    found = [path for path in sorted(trials.glob(f"*-{trial.address}")) if path.is_dir()]
    return found[0] if found else trials / f"{trial.name}-{trial.address}"


def is_finished(output: Path, trial: Trial, measures: Sequence[Measure]) -> bool:
    """Return whether a trial is trained and measured."""
    path = record_path(output, trial)
    if not path.exists():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    return all(measure.is_in(record) for measure in measures)


def new_record(run: RunFiles) -> dict[str, Any]:
    """Return the record of a trained trial without scores."""
    return {**_outcome(run), "scores": {}, "speed": _speed(run), "made": _made(run)}


def read_record(output: Path, study: Study, trial: Trial, measures: Sequence[Measure]) -> dict[str, Any]:
    """Return a trial's record as the report reads it: under the names of this study, with its measures and outcomes."""
    record = json.loads(record_path(output, trial).read_text(encoding="utf-8"))
    loss = math.nan if record["loss"] is None else record["loss"]
    speed = {key: math.nan if number is None else number for key, number in record["speed"].items()}
    scores = {m.label: [record["scores"][m.address][str(seed)] for seed in m.seeds] for m in measures}
    wanted = study.rule.outcomes if study.rule else ()
    means = {name: [mean] for name, mean in outcomes_of(measures, scores, wanted).items()}
    return {
        "trial": trial.name,
        "arm": trial.arm,
        "point": trial.point,
        "decay": decay_of(trial),
        **record,
        "loss": loss,
        "speed": speed,
        "scores": {**means, **scores},
    }


def _outcome(run: RunFiles) -> dict[str, Any]:
    """Collect the results that the seeds determine: size, length and held-out MLM loss of the last step."""
    config = run.config
    held_out = run.evaluations("mlm")
    if not held_out or held_out[-1][0] != config.total_steps:
        raise RunFailedError(f"{run.directory} logged no held-out MLM loss of its last step, {config.total_steps:,}")
    return {
        "parameters": parameters_of(config),
        "tokens": run.rows[-1]["tokens"],
        "sequences": config.batch.sequences,
        "loss": held_out[-1][1],
        "loss_of": "held-out MLM",
    }


def _speed(run: RunFiles) -> dict[str, Any]:
    workers = [len(event["workers"]) for event in run.events if event["event"] == WorkersStarted.KIND]
    return {
        "workers": workers[-1] if workers else 1,
        "tokens_per_second": run.median("tokens_per_second"),
        "mfu": run.median("mfu"),
    }


def _made(run: RunFiles) -> dict[str, Any]:
    """Return software, hardware and hours of a trial. A run without its own list of software has that of here."""
    path = RunDirectory(run.directory).software
    own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"software": {**software(), **own}, "hardware": _hardware(), "hours": run.seconds / 3600}


def _hardware() -> str:
    """Name the devices of this machine."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{os.cpu_count()} cores of {model}, no GPU"
