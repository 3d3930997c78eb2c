"""`detour study`: every trial of a grid trained once, evaluated, and put into one report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.errors import InputError, RunFailedError
from configs.schema import RunConfig
from monitoring.run_files import RunFiles, open_run
from monitoring.telemetry import Telemetry
from studies.evaluate import evaluate
from studies.finetune import Job
from studies.models import EXPORT
from studies.plan import Study, Trial, dump_study, expand
from studies.report import write_report
from studies.tasks import load_task, read_splits

STUDY = "study.yaml"
POLL_SECONDS = 0.5


class Cluster(Protocol):
    """What a study is handed to run its jobs with."""

    def room(self, config: RunConfig) -> int:
        """How many runs like this one the cluster holds at once. InputError for none."""
        ...

    def train(self, config: RunConfig, directory: Path) -> bool:
        """Run a job to its end; False where it was stopped early, all saved. InputError, RunFailedError."""
        ...

    def fine_tune(self, function: Callable[[Job], dict[str, Any]], jobs: Sequence[Job]) -> Iterable[dict[str, Any]]:
        """Call a function for each job; results as they come."""
        ...

    def stop(self) -> None:
        """Ask the running jobs to save and end."""
        ...


def run_study(study: Study, folder: Path, output: Path, cluster: Cluster, console: Console | None = None) -> bool:
    """Run what is left of a study in `output` and write its report; False where it was stopped early.

    A finished trial is never run again; one that was interrupted goes on from its checkpoint. Raises InputError for
    whatever can be found wrong before the first trial starts, and RunFailedError once the others have ended.
    """
    console = console or Console()
    trials = expand(study, folder)
    for task in study.evaluate:
        described, _, place = load_task(task.task, _overrides(task.protocol))
        read_splits(described, Path(task.data) if task.data else place)
    _claim(output, study)
    left = [trial for trial in trials if not _record(output, trial).exists()]
    if left:
        room = min(min(cluster.room(trial.config) for trial in left), len(left))
        console.print(
            f"{study.name}: {len(trials)} trials, {len(trials) - len(left)} finished before, {room} at a time",
            highlight=False,
        )
        if not _run_all(study, left, output, cluster, room, console):
            return False
    records = [json.loads(_record(output, trial).read_text(encoding="utf-8")) for trial in trials]
    console.print(str(write_report(study, records, output)), highlight=False, soft_wrap=True)
    return True


def _run_all(
    study: Study, trials: Sequence[Trial], output: Path, cluster: Cluster, room: int, console: Console
) -> bool:
    failures: dict[str, Exception] = {}
    stopped = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    total = sum(trial.config.total_steps for trial in trials)
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(room) as pool,
    ):
        bar = progress.add_task(study.name, total=total)
        running: dict[Future[bool], Trial] = {
            pool.submit(_run, study, trial, output, cluster): trial for trial in trials
        }
        finished = 0
        try:
            while running:
                done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    trial = running.pop(future)
                    if future.cancelled():
                        continue
                    error = future.exception()
                    if isinstance(error, InputError):
                        raise InputError(f"trial {trial.name}: {error}")
                    finished += 1
                    if isinstance(error, RunFailedError):
                        failures[trial.name] = error
                        console.print(f"{trial.name} failed: {error}", highlight=False)
                    elif error is not None:
                        raise error
                    elif not future.result():
                        stopped = True
                        for other in running:
                            other.cancel()
                    else:
                        console.print(f"{trial.name} is finished, {finished} of {len(trials)}", highlight=False)
                progress.update(bar, completed=sum(_steps(output, trial) for trial in trials))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            cluster.stop()
            raise
    if failures:
        raise RunFailedError(
            f"{len(failures)} of {len(trials)} trials failed, the others are kept; the same command runs these again: "
            + "; ".join(f"{name} ({error})" for name, error in failures.items())
        )
    return not stopped


def _run(study: Study, trial: Trial, output: Path, cluster: Cluster) -> bool:
    """One trial to its record; False where it was stopped early."""
    directory = output / "trials" / trial.name
    if not cluster.train(trial.config, directory):
        return False
    run = open_run(directory)
    record = {
        "trial": trial.name,
        "arm": trial.arm,
        "point": trial.point,
        **_outcome(run),
        "scores": {},
        "speed": _speed(run),
    }
    for task in study.evaluate:
        summary = evaluate(
            [str(directory / EXPORT)],
            task.task,
            output / "tasks" / trial.name / Path(task.task).stem,
            data=Path(task.data) if task.data else None,
            seeds=task.seeds,
            overrides=_overrides(task.protocol),
            parallel=cluster.fine_tune,
            say=lambda line: None,
        )
        record["scores"][summary["task"]] = [run["score"] for run in summary["runs"]]
    path = _record(output, trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return True


def _outcome(run: RunFiles) -> dict[str, Any]:
    """What the seeds fix: size, length, and the loss at the end.

    The loss is that on the held-out set at the last step, of MLM; without such a set the mean training loss over the
    last tenth of the last phase (8 logged steps at least), in which every arm of one point has the same masks.
    """
    from datapipe.tokenizer import load_tokenizer
    from engine.modernbert.config import parameter_count, resolve_architecture

    config = run.config
    architecture = resolve_architecture(config.model, load_tokenizer(config.tokenizer))
    held_out = run.evaluations("mlm")
    last = [row["loss"] for row in run.phase(len(config.phases) - 1) if row["loss"] is not None]
    tail = last[-max(8, len(last) // 10) :]
    if not tail:
        raise RunFailedError(f"{run.directory} logged no loss in its last phase; lower monitoring.every")
    return {
        "parameters": parameter_count(architecture),
        "tokens": run.rows[-1]["tokens"],
        "sequences": config.batch.sequences,
        "loss": held_out[-1][1] if held_out else sum(tail) / len(tail),
        "loss_of": "held-out MLM"
        if held_out
        else f"training {config.phases[-1].objective.upper()}, {len(tail)} last logged steps",
    }


def _speed(run: RunFiles) -> dict[str, Any]:
    places = [len(event["workers"]) for event in run.events if event["event"] == "workers_started"]
    return {
        "workers": places[-1] if places else 1,
        "tokens_per_second": run.median("tokens_per_second"),
        "mfu": run.median("mfu"),
    }


def _steps(output: Path, trial: Trial) -> int:
    """Completed steps of a trial, for the progress bar."""
    if _record(output, trial).exists():
        return trial.config.total_steps
    now = Telemetry.read(output / "trials" / trial.name)
    return now.step if now else 0


def _record(output: Path, trial: Trial) -> Path:
    return output / "records" / f"{trial.name}.json"


def _overrides(protocol: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in protocol.items()]


def _claim(output: Path, study: Study) -> None:
    """Make `output` this study's. InputError where it holds another."""
    path, text = output / STUDY, dump_study(study)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"--output {output} holds a different study ({path}); choose another directory for this one")
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror}; choose another") from None
