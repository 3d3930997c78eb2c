"""A job: one run, from its configuration to the exported model, through failures and preemptions."""

from __future__ import annotations

import importlib
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from rich.console import Console
from rich.markup import escape

from configs.errors import InputError, RunFailedError
from configs.files import partial_path
from configs.schema import RunConfig
from configs.units import format_count
from datapipe.loader import check_sources
from datapipe.prepare import ensure_prepared
from datapipe.source import SourceSummary
from datapipe.tokenizer import Tokenizer, load_tokenizer
from launcher.cluster import Node, alive_nodes, connect, draining_nodes, is_joined
from launcher.directory import claim
from launcher.failures import FailureBudget, HangWatch
from launcher.group import NoRoomError, Shape, WorkerError, WorkerGroup
from launcher.status import status_line
from launcher.stop import PREEMPTED, RESIZED, SIGNAL, StopRequest
from launcher.summary import print_header, print_summary
from launcher.worker import Ending
from monitoring.discovery import announced
from monitoring.events import (
    DataDamaged,
    Exported,
    Failed,
    Finished,
    Preempted,
    Resized,
    Stopped,
    WorkerFailed,
    WorkersStarted,
    record,
)
from monitoring.exporter import Exporter
from monitoring.progress import Progress
from monitoring.report import write_report
from monitoring.run_directory import RunDirectory
from monitoring.telemetry import Telemetry

WORKING_COPIES = "working_dir_files"
"""Ray's folder for them."""


@dataclass(frozen=True)
class _Run:
    """What every attempt of a run shares."""

    config: RunConfig
    directory: Path
    home: Path
    """What relative paths of the configuration are relative to."""
    shapes: list[Shape]
    """The largest first."""

    def grows(self, now: Shape, nodes: list[Node]) -> bool:
        """Whether there are nodes for more workers than now."""
        return any(shape.nodes > now.nodes and shape.fits_on(nodes) for shape in self.shapes)


def run_job(config: RunConfig, directory: Path, console: Console | None = None) -> Ending:
    """Train `config` in `directory`, from its newest checkpoint if it has one, and export the model.

    Raises InputError for whatever the configuration, the data or a checkpoint have wrong, before anything is started
    where that can be known, and RunFailedError where the run fails otherwise.
    """
    console = console or Console()
    directory, home = directory.absolute(), Path.cwd()
    _require_lasting(directory)
    with claim(directory, config), ExitStack() as stack:
        if RunDirectory(directory).export.exists() or _trained(directory, config):
            console.print(f"{directory} was trained to its last step before; nothing is left to train")
            return _finish(config, directory, load_tokenizer(config.tokenizer), console)
        _nodes(config)
        tokenizer = load_tokenizer(config.tokenizer)
        with status_line(console, "preparing shards") as show:
            ensure_prepared(config.data, tokenizer, show)
        with _importing("engine.parallel"):  # takes torch seconds, which Ray's processes need to start as well
            stack.enter_context(connect(local_workers=_workers(config, gpus=0)))
        shapes, precision = _check(config, tokenizer, directory, console)
        exporter = stack.enter_context(
            Exporter(directory, config.name, config.monitoring.address, config.monitoring.port)
        )
        stack.enter_context(announced(Path(config.monitoring.targets), exporter.target))
        print_header(console, config, directory, shapes[0], precision, exporter.url)
        try:
            with StopRequest() as stop, Progress(directory, console) as progress:
                result = _attempts(_Run(config, directory, home, shapes), stop, progress)
        except (RunFailedError, InputError) as error:
            _report_failure(directory, error)
            raise
        if result.finished:
            return _finish(config, directory, tokenizer, console)
        record(directory, Stopped(step=result.step, reason=result.reason))
        write_report(directory)
        return result


def _require_lasting(directory: Path) -> None:
    """InputError for a run directory in the copy of `--working-dir` that Ray keeps on each node, and deletes."""
    if is_joined() and WORKING_COPIES in directory.parts:
        raise InputError(
            f"--output {directory} lies in Ray's copy of the job's working directory, which is another one on each "
            "node and is deleted with the job; give an absolute --output on storage that all nodes share"
        )


@contextmanager
def _importing(module: str) -> Iterator[None]:
    """Import it behind the body. An error of the import is met again by whoever needs the module."""
    thread = Thread(target=importlib.import_module, args=(module,))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _check(config: RunConfig, tokenizer: Tokenizer, directory: Path, console: Console) -> tuple[list[Shape], str]:
    """Everything that can be wrong is found here, before workers start.

    Returns the shapes the run may take, the largest first, and its precision where that is known. Raises InputError.
    """
    from engine.modernbert.config import parameter_count, resolve_architecture
    from engine.parallel import plan
    from engine.precision import resolve_precision

    architecture = resolve_architecture(config.model, tokenizer)
    shapes, problems = [], {}
    for shape in possible_shapes(config):
        try:
            plan(config, architecture, shape.workers)
            shapes.append(shape)
        except InputError as error:
            problems[shape] = error
    if not shapes:
        raise list(problems.values())[-1]
    for shape, problem in problems.items():
        console.print(f"[yellow]{shape}: will not be used:[/] {escape(str(problem))}")
    precision: str = config.precision
    if not is_joined():  # the head of a cluster may have another device than its workers, which check for themselves
        precision = resolve_precision(config, parameter_count(architecture))
    sources = check_sources(config.data, tokenizer, architecture.vocab_size)
    for source in sources:
        for damage in source.problems:
            console.print(f"[yellow]source {source.name}: will be skipped:[/] {escape(damage)}")
        if source.problems:
            damage = DataDamaged(source=source.name, problems=len(source.problems), first=source.problems[0])
            record(directory, damage)
    _require_enough(config, sources)
    return shapes, precision


def _require_enough(config: RunConfig, sources: list[SourceSummary]) -> None:
    """Raises InputError where every source ends after some epochs, surely before the last step."""
    limits = [source.epochs for source in config.data.sources]
    summaries = sources[: len(limits)]  # without the evaluation set
    if None in limits or not all(source.tokens for source in summaries):  # raw text is not counted before it is read
        return
    tokens = sum(
        (source.tokens + 2 * source.documents) * (epochs or 0) for source, epochs in zip(summaries, limits, strict=True)
    )
    steps = 2 * tokens // config.tokens_per_step  # packed rows are at least half full
    if steps < config.total_steps:
        raise InputError(
            f"data.sources: all reach their `epochs` after {format_count(tokens)} tokens, at most {steps:,} of the "
            f"{config.total_steps:,} steps; shorten the phases, or let a source repeat"
        )


def possible_shapes(config: RunConfig) -> list[Shape]:
    """Nodes and workers by the configuration and the devices of the cluster or this machine, the most nodes first."""
    fewest, most = _nodes(config)
    if config.cluster.gpus_per_node != "auto":
        gpus = config.cluster.gpus_per_node
    elif is_joined():
        gpus = max((node.gpus for node in alive_nodes()), default=0)
    else:
        import torch

        gpus = torch.cuda.device_count()
    per_node = _workers(config, gpus)
    if 0 < gpus < per_node:
        raise InputError(f"cluster.workers_per_node: {per_node} workers, but a node has {gpus} GPUs")
    return [Shape(number, per_node, gpu=gpus > 0) for number in range(most, fewest - 1, -1)]


def _nodes(config: RunConfig) -> tuple[int, int]:
    """Fewest and most nodes of the run. InputError where it needs a cluster and this process is in none."""
    nodes = config.cluster.nodes
    fewest, most = (nodes, nodes) if isinstance(nodes, int) else nodes
    if is_joined():
        return fewest, most
    if fewest > 1:
        raise InputError(
            f"cluster.nodes: asked for {fewest} nodes, but this process is in no Ray cluster and would start one "
            "of 1 node here; set RAY_ADDRESS or use `ray job submit`, or lower --nodes to 1"
        )
    return 1, 1


def _workers(config: RunConfig, gpus: int) -> int:
    """Of each node, which has so many GPUs."""
    if config.cluster.workers_per_node == "auto":
        return gpus or config.parallel.tensor * config.parallel.pipeline
    return config.cluster.workers_per_node


def _attempts(run: _Run, stop: StopRequest, progress: Progress) -> Ending:
    """Start workers again after each failure that may be survived, each preemption and each change of the nodes."""
    budget = FailureBudget(run.config.cluster.max_failures)
    preemptions = 0
    attempted = False
    while stop.reason != SIGNAL:
        stop.clear()
        try:
            ending = _attempt(run, stop, progress)
        except WorkerError as failure:
            step = _last_step(run.directory)
            event = WorkerFailed(step=step, reason=failure.reason, rank=failure.rank, detail=failure.detail)
            record(run.directory, event)
            pause = budget.spend(failure, _saved_step(run.directory))
            progress.note(f"{failure}; starting again")
            _rest(pause, stop)
        except _StopWhileStartingError:
            break
        except NoRoomError:
            if not attempted:
                raise
            reason = "the nodes it lost were not replaced in time"
            return Ending(_saved_step(run.directory), finished=False, reason=reason)
        else:
            if ending.finished or ending.reason not in (PREEMPTED, RESIZED):
                return ending
            if ending.reason == RESIZED:
                record(run.directory, Resized(step=ending.step))
            else:
                record(run.directory, Preempted(step=ending.step))
                preemptions += 1
                if preemptions > run.config.cluster.max_preemptions:
                    reason = f"preemption {preemptions} and cluster.max_preemptions allows {preemptions - 1}"
                    return Ending(ending.step, finished=False, reason=reason)
        attempted = True
    return Ending(_saved_step(run.directory), finished=False, reason=SIGNAL)


class _StopWhileStartingError(Exception):
    """A signal came while no worker was there to save anything."""


def _rest(seconds: float, stop: StopRequest) -> None:
    """Sleep, unless the job is to end."""
    until = time.monotonic() + seconds
    while stop.reason != SIGNAL and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))


def _attempt(run: _Run, stop: StopRequest, progress: Progress) -> Ending:
    """Start workers and train until they finish or are stopped. Raises InputError and WorkerError."""
    known = alive_nodes()
    began = time.monotonic()
    with _open_group(run, known, stop, progress) as group:
        seconds = round(time.monotonic() - began, 2)
        addresses = [place.address for place in group.places]
        record(run.directory, WorkersStarted(workers=addresses, seconds=seconds))
        progress.note("loading the model")
        mine = {place.node for place in group.places}
        hang = HangWatch(run.directory, run.config.cluster.hang_timeout)

        def watch() -> str | None:
            hang.check()
            if mine & draining_nodes().keys():  # about to be taken away: save now, and go on elsewhere
                stop.ask(PREEMPTED)
            elif len(run.shapes) > 1 and (nodes := alive_nodes()) != known and run.grows(group.shape, nodes):
                stop.ask(RESIZED)
            return stop.reason

        return group.train(watch)


def _open_group(run: _Run, nodes: list[Node], stop: StopRequest, progress: Progress) -> WorkerGroup:
    """Workers in the largest shape that finds room. Raises NoRoomError where even the smallest does not."""

    def watch() -> None:
        if stop.reason == SIGNAL:
            raise _StopWhileStartingError

    for shape in run.shapes:
        last = shape is run.shapes[-1]
        if not last and not shape.fits_on(nodes):
            continue
        progress.note(f"starting {shape.workers} worker{'s' * (shape.workers > 1)}")
        try:
            return WorkerGroup(shape, run.config, run.directory, run.home, watch, patient=last)
        except NoRoomError:
            if last:
                raise
    raise AssertionError("a run has at least one shape")


def _saved_step(directory: Path) -> int:
    """Completed steps of the newest checkpoint; 0 without one."""
    from engine.checkpoint import list_checkpoints, step_of

    newest = list_checkpoints(RunDirectory(directory).checkpoints)[:1]
    return step_of(newest[0]) if newest else 0


def _trained(directory: Path, config: RunConfig) -> bool:
    """Whether the last step is in a checkpoint that can be exported."""
    checkpoints = RunDirectory(directory).checkpoints
    if not checkpoints.exists():
        return False
    from engine.checkpoint import latest_valid, step_directory

    last = step_directory(checkpoints, config.total_steps)
    return last.exists() and latest_valid(checkpoints)[0] == last


def _last_step(directory: Path) -> int:
    """Completed steps of the workers, by what they last reported."""
    now = Telemetry.read(directory)
    return now.step if now else 0


def _report_failure(directory: Path, failure: Exception) -> None:
    """Leave what is known of a failed run. An error of this must not hide why it failed."""
    try:
        record(directory, Failed(step=_last_step(directory), detail=str(failure)))
        write_report(directory)
    except Exception as error:
        logging.getLogger(__name__).warning("%s: no report of the failed run: %s", directory, error)


def _finish(config: RunConfig, directory: Path, tokenizer: Tokenizer, console: Console) -> Ending:
    """Export the final checkpoint, once, and say what came out."""
    from engine.checkpoint import step_directory
    from engine.export import export_hf

    run = RunDirectory(directory)
    export = run.export
    if not export.exists():
        with console.status("exporting"):
            partial = partial_path(export)
            shutil.rmtree(partial, ignore_errors=True)
            export_hf(step_directory(run.checkpoints, config.total_steps), partial, tokenizer)
            partial.rename(export)
        record(directory, Exported(step=config.total_steps, path=export.name))
        record(directory, Finished(step=config.total_steps))
    print_summary(console, config, directory, export, write_report(directory))
    return Ending(config.total_steps, finished=True)
