"""`detour study`: every trial of a grid trained once, evaluated, and put into one report."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from monitoring.run_directory import RunDirectory
from monitoring.run_files import open_run
from monitoring.telemetry import Telemetry
from studies.checks import plan_lines, require_held_out, require_text
from studies.evaluate import require_libraries
from studies.finetune import Job
from studies.measures import Measure, measures_of
from studies.notes import before_training, leakage_lines, look_at_spread
from studies.plan import Study, Trial, dump_study, expand, order_of, orders_of, trunks_of
from studies.records import is_finished, new_record, read_record, record_path, trial_directory
from studies.report import write_report
from studies.room import require_room, thin
from studies.tables import finite

STUDY, PLAN = "study.yaml", "plan.md"
POLL_SECONDS = 0.5


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


def run_study(
    study: Study, folder: Path, output: Path, cluster: Cluster, console: Console | None = None, *, plan: bool = False
) -> bool:
    """Run the trials that are not finished yet, and write the report.

    A finished trial is never repeated. An interrupted trial continues from its checkpoint.

    Args:
        study: The study.
        folder: Folder that its recipe is looked for in.
        output: Folder of the trials, the records and the report.
        cluster: Runs the jobs.
        console: Receives the progress.
        plan: Only check everything and print the plan.

    Returns:
        False if the study was stopped early.

    Raises:
        InputError: The study, a task, a text or the output is wrong; raised before the first trial starts.
        RunFailedError: A trial failed; raised when the others have ended.
    """
    console = console or Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    trials = expand(study, folder)
    if study.evaluate or study.rule:
        require_libraries()
    measures = measures_of(study.evaluate)
    require_held_out(study, trials)
    _require_own_folder(output, study)
    left = [trial for trial in trials if not is_finished(output, trial, measures)]
    require_text(left)
    lines = plan_lines(study, trials, measures)
    at_once = min([len(left), *(cluster.room(trial.config) for trial in left)]) if left and not plan else 1
    if left:
        lines.append(f"Disk: {require_room(output, left, trunks_of(trials), at_once)}")
    for line in lines:
        say(line)
    if plan:
        return True
    _claim(output, study, lines)
    if left:
        say(f"{study.name}: {len(trials)} trials, {len(trials) - len(left)} finished before, {at_once} at a time")
    leaks = leakage_lines(trials, measures, output)
    for line in leaks:
        say(line)
    looked, trunks = [], trunks_of(trials)
    for part in _parts(study, trials):
        unfinished = [trial for trial in part if not is_finished(output, trial, measures)]
        if unfinished and not _run_all(study.name, unfinished, trunks, measures, output, cluster, at_once, console):
            return False
        if len(part) < len(trials):
            stops, sentence = look_at_spread(
                study, [read_record(output, study, trial, measures) for trial in part], output
            )
            looked.append(sentence)
            say(sentence)
            if stops:
                trials = part
                break
    records = [read_record(output, study, trial, measures) for trial in trials]
    notes = [
        *looked,
        *before_training(trials, measures, output, cluster.fine_tune),
        *leaks,
    ]
    say(str(write_report(study, records, output, notes, [measure.row for measure in measures])))
    return True


def _parts(study: Study, trials: list[Trial]) -> list[list[Trial]]:
    """Return the trials before the look at the spread, if the rule has one, and all trials."""
    first = study.rule.look_after if study.rule else None
    orders = orders_of(trials)
    if first is None or first >= len(orders):
        return [trials]
    return [[trial for trial in trials if order_of(trial) in orders[:first]], trials]


def _run_all(
    name: str,
    trials: Sequence[Trial],
    trunks: Mapping[str, Trial],
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
    end = trunk.config.total_steps
    if not step_directory(RunDirectory(directory).checkpoints, end).exists() and not cluster.train(
        trunk.config.model_copy(update={"name": directory.name}), directory
    ):
        return False
    thin(directory, trunk.config, {end})
    return True


def _run(
    trial: Trial, measures: Sequence[Measure], output: Path, cluster: Cluster, origin: Origin | None = None
) -> bool:
    """Train and measure one trial, as far as its record lacks it; return False if it was stopped early."""
    directory = trial_directory(output, trial)
    path = record_path(output, trial)
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    else:
        begun = RunDirectory(directory).config
        if begun.exists():
            origin = load_config(str(begun)).origin
        if not cluster.train(trial.config.model_copy(update={"name": directory.name, "origin": origin}), directory):
            return False
        run = open_run(directory)
        record = new_record(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, finite(record))
    for measure in measures:
        if not measure.is_in(record):
            folder = output / "tasks" / directory.name / measure.folder
            record["scores"].setdefault(measure.address, {}).update(
                measure.take(str(RunDirectory(directory).export), folder, cluster.fine_tune)
            )
            write_json(path, finite(record))
    thin(directory, trial.config, {span.last for span in trial.config.spans[:-1]})
    return True


def _steps(output: Path, trial: Trial) -> int:
    """Count the completed steps of a trial, for the progress bar."""
    if record_path(output, trial).exists():
        return trial.config.total_steps
    telemetry = Telemetry.read(trial_directory(output, trial))
    return telemetry.step if telemetry else 0


def _require_own_folder(output: Path, study: Study) -> None:
    """Require that the output holds this study or none, and that its rule is as it was before the first result.

    Raises:
        InputError: The folder holds another study, or results that another rule was written for.
    """
    path = output / STUDY
    if not path.exists():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if before.get("name") != study.name:
        raise InputError(
            f"--output {output} holds a different study ({path}); choose another directory",
            key="--output",
            code="another-study",
        )
    rules = [dict(rule or {}) for rule in (before.get("rule"), study.rule and study.rule.model_dump(mode="json"))]
    for rule in rules:
        rule.pop("spread", None)  # which decides nothing
    if json.dumps(rules[0]) != json.dumps({k: v for k, v in rules[1].items() if v is not None}) and any(
        (output / "records").glob("*.json")
    ):
        raise InputError(
            f"rule: {path} has another rule, and results exist already; a rule is fixed before the first result, so "
            "take the old rule, or choose another --output",
            key="rule",
            code="rule-changed",
        )


def _claim(output: Path, study: Study, plan: Sequence[str]) -> None:
    """Write the study and its plan into its output folder. The same study may grow there.

    Raises:
        InputError: The folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / STUDY, dump_study(study))
        write_atomically(output / PLAN, f"# Plan of {study.name}\n\n" + "".join(f"- {line}\n" for line in plan))
    except OSError as error:
        raise InputError(
            f"--output {output} cannot be written: {error.strerror}; choose another directory", key="--output"
        ) from None
