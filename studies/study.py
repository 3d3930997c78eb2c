"""`detour study`: every trial of a grid trained once, evaluated, and put into one report."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.errors import InputError, RunFailedError
from configs.files import write_atomically, write_json
from configs.load import load_config
from configs.schema import Origin, RunConfig
from monitoring.events import WorkersStarted
from monitoring.run_directory import RunDirectory
from monitoring.run_files import RunFiles, open_run
from monitoring.telemetry import Telemetry
from studies.evaluate import digest_of, require_libraries, said_of_leakage
from studies.finetune import Job
from studies.leakage import Corpora, leakage, name_of, size_of
from studies.measures import Measure, measures_of
from studies.plan import Study, Trial, dump_study, expand, trunks_of
from studies.report import write_report

STUDY = "study.yaml"
POLL_SECONDS = 0.5
FEWEST_LOSSES = 8
"""Logged losses that a final training loss is averaged over, at least."""


class Cluster(Protocol):
    """The means to run jobs, which a study is handed."""

    def room(self, config: RunConfig) -> int:
        """Return how many runs like this the cluster holds at once.

        Raises:
            InputError: The cluster is too small for one run.
        """
        ...

    def train(self, config: RunConfig, directory: Path) -> bool:
        """Run a job to its end; return False if it was stopped early with everything saved.

        Raises:
            InputError: The job's input is wrong.
            RunFailedError: The job failed.
        """
        ...

    def fine_tune(self, function: Callable[[Job], dict[str, Any]], jobs: Sequence[Job]) -> Iterable[dict[str, Any]]:
        """Call a function for each job, and yield the results as they come."""
        ...

    def stop(self) -> None:
        """Ask the running jobs to save and end."""
        ...


def run_study(study: Study, folder: Path, output: Path, cluster: Cluster, console: Console | None = None) -> bool:
    """Run the trials that are not finished yet, and write the report.

    A finished trial is never repeated. An interrupted trial continues from its checkpoint.

    Args:
        study: The study.
        folder: Folder that its recipe is looked for in.
        output: Folder of the trials, the records and the report.
        cluster: Runs the jobs.
        console: Receives the progress.

    Returns:
        False if the study was stopped early.

    Raises:
        InputError: The study, a task or the output is wrong; raised before the first trial starts.
        RunFailedError: A trial failed; raised when the others have ended.
    """
    console = console or Console()
    trials = expand(study, folder)
    if study.evaluate:
        require_libraries()
    measures = measures_of(study.evaluate)
    _claim(output, study)
    left = [trial for trial in trials if not _is_finished(output, trial, measures)]
    if left:
        room = min(min(cluster.room(trial.config) for trial in left), len(left))
        console.print(
            f"{study.name}: {len(trials)} trials, {len(trials) - len(left)} finished before, {room} at a time",
            highlight=False,
        )
        if not _run_all(study.name, left, measures, output, cluster, room, console):
            return False
    records = [_record(output, trial, measures) for trial in trials]
    leaked = _leakage(trials, measures, output)
    console.print(str(write_report(study, records, output, leaked)), highlight=False, soft_wrap=True)
    return True


def _run_all(
    name: str,
    trials: Sequence[Trial],
    measures: Sequence[Measure],
    output: Path,
    cluster: Cluster,
    room: int,
    console: Console,
) -> bool:
    """Run trials, `room` at a time; return False if they were stopped early."""
    failures: dict[str, RunFailedError] = {}
    stopped = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    total = sum(trial.config.total_steps for trial in trials)
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(room) as pool,
    ):
        bar = progress.add_task(name, total=total)
        trunks = trunks_of(trials)
        branches: defaultdict[str, list[Trial]] = defaultdict(list)
        running: dict[Future[bool], Trial] = {}
        for trial in trials:
            trunk = trunks.get(trial.address)
            if trunk is None:
                running[pool.submit(_run, trial, measures, output, cluster)] = trial
                continue
            if trunk.address not in branches:
                running[pool.submit(_train_trunk, trunk, output, cluster)] = trunk
            branches[trunk.address].append(trial)
        ended = 0
        try:
            while running:
                done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    trial = running.pop(future)
                    if future.cancelled():
                        continue
                    finished = _finished(future, trial, failures)
                    if finished and (shared := branches.pop(trial.address, None)):
                        origin = Origin(
                            run=str(trial_directory(output, trial).absolute()), step=trial.config.total_steps
                        )
                        for branch in shared:
                            running[pool.submit(_run, branch, measures, output, cluster, origin)] = branch
                        console.print(f"{len(shared)} trials branch off a trunk that is trained", highlight=False)
                        continue
                    ended += 1
                    if trial.name in failures:
                        console.print(f"{trial.name} failed: {failures[trial.name]}", highlight=False)
                    elif finished:
                        console.print(f"{trial.name} is finished, {ended} of {len(trials)}", highlight=False)
                    else:
                        stopped = True
                        for other in running:
                            other.cancel()
                progress.update(bar, completed=sum(_steps(output, trial) for trial in trials))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            cluster.stop()
            raise
    if failures:
        raise RunFailedError(
            f"{len(failures)} of {len(trials)} trials failed, the others are kept; the same command runs the failed "
            "trials again: " + "; ".join(f"{name} ({error})" for name, error in failures.items())
        )
    return not stopped


def _finished(future: Future[bool], trial: Trial, failures: dict[str, RunFailedError]) -> bool:
    """Return whether a trial has reached its end; a failed trial is added to `failures`."""
    try:
        return future.result()
    except InputError as error:
        raise InputError(f"trial {trial.name}: {error}", key=error.key, code=error.code) from None
    except RunFailedError as error:
        failures[trial.name] = error
        return False


def _train_trunk(trunk: Trial, output: Path, cluster: Cluster) -> bool:
    """Train a trunk unless that is done; return False if it was stopped early."""
    from engine.checkpoint import step_directory

    directory = trial_directory(output, trunk)
    if step_directory(RunDirectory(directory).checkpoints, trunk.config.total_steps).exists():
        return True
    return cluster.train(trunk.config.model_copy(update={"name": directory.name}), directory)


def _run(
    trial: Trial, measures: Sequence[Measure], output: Path, cluster: Cluster, origin: Origin | None = None
) -> bool:
    """Train and measure one trial, as far as its record lacks it; return False if it was stopped early."""
    directory = trial_directory(output, trial)
    path = _record_path(output, trial)
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    else:
        begun = RunDirectory(directory).config
        if begun.exists():
            origin = load_config(str(begun)).origin
        if not cluster.train(trial.config.model_copy(update={"name": directory.name, "origin": origin}), directory):
            return False
        run = open_run(directory)
        record = {**_outcome(run), "scores": {}, "speed": _speed(run)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    for measure in measures:
        if not measure.is_in(record):
            folder = output / "tasks" / directory.name / measure.folder
            record["scores"].setdefault(measure.address, {}).update(
                measure.take(str(RunDirectory(directory).export), folder, cluster.fine_tune)
            )
            write_json(path, record)
    return True


def _record(output: Path, trial: Trial, measures: Sequence[Measure]) -> dict[str, Any]:
    """Return a trial's record as the report reads it: under the names of this study, with this study's measures."""
    record = json.loads(_record_path(output, trial).read_text(encoding="utf-8"))
    scores = {m.label: [record["scores"][m.address][str(seed)] for seed in m.seeds] for m in measures}
    return {"trial": trial.name, "arm": trial.arm, "point": trial.point, **record, "scores": scores}


def _is_finished(output: Path, trial: Trial, measures: Sequence[Measure]) -> bool:
    path = _record_path(output, trial)
    if not path.exists():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    return all(measure.is_in(record) for measure in measures)


def trial_directory(output: Path, trial: Trial) -> Path:
    """Return the directory of a trial: one with its address, whatever it was named, else a new one."""
    trials = output / "trials"
    found = [path for path in sorted(trials.glob(f"*-{trial.address}")) if path.is_dir()]
    return found[0] if found else trials / f"{trial.name}-{trial.address}"


def _leakage(trials: Sequence[Trial], measures: Sequence[Measure], output: Path) -> list[str]:
    """Search the training text of all trials for the test examples of each task, once per text and task."""
    lines = []
    corpora = Corpora()
    for trial in trials:
        corpora.add_run(trial.name, trial.config)
    text = [[name_of(file), size_of(file)] for file in corpora.files]
    for measure in measures:
        lines.append(measure.description)
        if measure.splits is None:
            continue
        content = json.dumps([text, corpora.unseen, digest_of(measure.splits)])
        path = output / "leakage" / f"{hashlib.sha256(content.encode()).hexdigest()[:10]}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, leakage(measure.splits.test, corpora))
        found = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"{measure.label}: {line}" for line in (*measure.splits.notes, *said_of_leakage(found))]
    return list(dict.fromkeys(lines))


def _outcome(run: RunFiles) -> dict[str, Any]:
    """Collect the results that the seeds determine: size, length and final loss.

    The final loss is the held-out MLM loss of the last step. Without a held-out set it is the mean training loss over
    the last tenth of the last phase, in which every arm of one grid point has the same masks.
    """
    from datapipe.tokenizer import load_tokenizer
    from engine.modernbert.config import parameter_count, resolve_architecture

    config = run.config
    architecture = resolve_architecture(config.model, load_tokenizer(config.tokenizer))
    held_out = run.evaluations("mlm")
    losses = [row["loss"] for row in run.phase(len(config.phases) - 1) if row["loss"] is not None]
    tail = losses[-max(FEWEST_LOSSES, len(losses) // 10) :]
    if not tail:
        raise RunFailedError(f"{run.directory} logged no loss in its last phase; lower monitoring.every")
    objective = config.phases[-1].objective_name.upper()
    return {
        "parameters": parameter_count(architecture),
        "tokens": run.rows[-1]["tokens"],
        "sequences": config.batch.sequences,
        "loss": held_out[-1][1] if held_out else sum(tail) / len(tail),
        "loss_of": "held-out MLM" if held_out else f"training {objective}, {len(tail)} last logged steps",
    }


def _speed(run: RunFiles) -> dict[str, Any]:
    workers = [len(event["workers"]) for event in run.events if event["event"] == WorkersStarted.KIND]
    return {
        "workers": workers[-1] if workers else 1,
        "tokens_per_second": run.median("tokens_per_second"),
        "mfu": run.median("mfu"),
    }


def _steps(output: Path, trial: Trial) -> int:
    """Count the completed steps of a trial, for the progress bar."""
    if _record_path(output, trial).exists():
        return trial.config.total_steps
    telemetry = Telemetry.read(trial_directory(output, trial))
    return telemetry.step if telemetry else 0


def _record_path(output: Path, trial: Trial) -> Path:
    return output / "records" / f"{trial_directory(output, trial).name}.json"


def _claim(output: Path, study: Study) -> None:
    """Write the study into its output folder. The same study may grow there, because trials are found by content.

    Raises:
        InputError: The folder holds another study or cannot be written.
    """
    path = output / STUDY
    if path.exists() and (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("name") != study.name:
        raise InputError(
            f"--output {output} holds a different study ({path}); choose another directory",
            key="--output",
            code="another-study",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump_study(study))
    except OSError as error:
        raise InputError(
            f"--output {output} cannot be written: {error.strerror}; choose another directory", key="--output"
        ) from None
