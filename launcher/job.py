"""One run, from its configuration to the exported model."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Thread

import ray
from rich.console import Console

from configs.errors import InputError, RunFailedError
from configs.files import partial_path, write_json
from configs.schema import RunConfig
from configs.versions import software
from datapipe.prepare import ensure_prepared
from datapipe.tokenizer import Tokenizer
from engine.run_inputs import keep_tokenizer, run_tokenizer
from launcher.branch import begin_branch, check_branch
from launcher.claim import claim
from launcher.cluster import connect, require_cluster
from launcher.exits import STOPPED
from launcher.head import HeadWatch
from launcher.preflight import check, check_initial_model, node_range, require_lasting
from launcher.rules import require_sound_schedule, workers_per_node
from launcher.status_line import status_line
from launcher.stop import HEAD_LOST, SIGNAL, StopRequest
from launcher.summary import print_header, print_summary
from launcher.supervisor import Run, last_step, saved_step, supervise
from launcher.worker import RunResult
from monitoring.discovery import announced
from monitoring.events import Exported, Failed, Finished, Stopped, record
from monitoring.exporter import Exporter
from monitoring.log import read_events
from monitoring.progress import Progress
from monitoring.report import write_report
from monitoring.run_directory import RunDirectory
from monitoring.run_state import state_of

SAVE_SECONDS = 20.0
"""Seconds that workers may take to save after their head is lost, before Ray ends their processes too."""


def run_job(config: RunConfig, directory: Path, console: Console | None = None) -> RunResult:
    """Train `config` in `directory`, from its newest checkpoint if it has one, and export the model.

    Raises:
        InputError: The configuration, the data or a checkpoint is wrong. The checks come before the start if possible.
        RunFailedError: The run failed for another reason.
    """
    console = console or Console()
    directory, working_directory = directory.absolute(), Path.cwd()
    require_lasting(directory)
    with claim(directory, config) as config, ExitStack() as stack:
        if config.origin and not saved_step(directory):
            require_sound_schedule(config)
            begin_branch(directory, config, config.origin, check_branch(config, config.origin))
        if RunDirectory(directory).export.exists() or _is_trained(directory, config):
            console.print(f"{directory} was trained to its last step before; nothing is left to train")
            return _finish(config, directory, run_tokenizer(config, directory), console)
        require_cluster()
        node_range(config)  # fails early if the run needs a cluster
        tokenizer = run_tokenizer(config, directory)
        if not saved_step(directory):  # a run that is under way keeps what it was started with
            require_sound_schedule(config)
            check_initial_model(config, tokenizer, directory, console)  # before Ray: a wrong file is soon found
        keep_tokenizer(tokenizer, directory)
        with status_line(console, "preparing shards") as show:
            ensure_prepared(
                config.data,
                tokenizer,
                show,
                lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
            )
        with _importing("engine.parallel"):  # torch's import takes seconds, and so does the start of Ray's processes
            stack.enter_context(connect(local_workers=workers_per_node(config, gpus=0)))
        plan = check(config, tokenizer, directory, console)
        write_json(RunDirectory(directory).software, software())
        exporter = stack.enter_context(
            Exporter(directory, config.name, config.monitoring.address, config.monitoring.port)
        )
        stack.enter_context(announced(Path(config.monitoring.targets).expanduser(), exporter.target))
        print_header(console, config, directory, plan.topologies[0], plan.precision, exporter.url)
        run = Run(config, directory, working_directory, plan.topologies)
        with Progress(directory, console) as progress, failures_recorded(directory), StopRequest() as stop:
            head = ray.get_runtime_context().gcs_address
            with (
                HeadWatch(head, lambda message: _end_without_head(message, directory, stop, progress)),
                closing(run.spares),
            ):
                result = supervise(run, stop, progress)
            if not result.finished:
                record(directory, Stopped(step=result.step, reason=result.reason))
        if result.finished:
            return _finish(config, directory, tokenizer, console)
        write_report(directory)
        return result


@contextmanager
def _importing(module: str) -> Iterator[None]:
    """Import a module in another thread. Whoever needs the module meets an error of the import again."""
    thread = Thread(target=importlib.import_module, args=(module,))
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def failures_recorded(directory: Path) -> Iterator[None]:
    """Record an error of the body as the end of the run, and write its report. The error goes on to the caller.

    Raises:
        RunFailedError: The body raised OSError, because the run directory has gone or can no longer be written.
    """
    try:
        yield
    except (RunFailedError, InputError) as failure:
        _record_failure(directory, failure)
        raise
    except OSError as error:
        gone = RunFailedError(
            f"--output {directory} can no longer be used: {error.filename or directory}: {error.strerror or error}; "
            "once it is there again and writable, the same command continues"
        )
        _record_failure(directory, gone)
        raise gone from error


def _record_failure(directory: Path, failure: Exception) -> None:
    try:
        record(directory, Failed(step=last_step(directory), detail=str(failure)))
        write_report(directory)
    except Exception as error:  # it must not hide why the run failed
        logging.getLogger(__name__).warning("%s: no report of the failed run: %s", directory, error)


def _end_without_head(message: str, directory: Path, stop: StopRequest, progress: Progress) -> None:
    """Let the workers save, record the failure, and end this process with exit code 75.

    Workers reach each other without the head. Their nodes may outlive it by a minute, in which they would write into
    the directory of a run that has been started again. Therefore they are asked to stop.
    """
    asked = stop.reason == SIGNAL  # a signal to all processes, as `timeout` sends it, ends the head too
    saved_before, until = saved_step(directory), time.monotonic() + SAVE_SECONDS
    stop.relay(HEAD_LOST)
    while (saved := saved_step(directory)) == saved_before and time.monotonic() < until:
        time.sleep(0.5)
    failure = RunFailedError(f"{message}; the newest checkpoint is of step {saved}")
    try:
        if asked and saved >= last_step(directory):
            record(directory, Stopped(step=saved, reason=SIGNAL))
            write_report(directory)
        else:
            _record_failure(directory, failure)
        progress.tell_events()
        print(f"stopped: {failure}; the same command again continues", file=sys.stderr, flush=True)
    finally:
        sys.stdout.flush()
        os._exit(STOPPED)  # because Ray would wait for the head once more


def _is_trained(directory: Path, config: RunConfig) -> bool:
    """Return whether a valid checkpoint holds the last step."""
    checkpoints = RunDirectory(directory).checkpoints
    if not checkpoints.exists():
        return False
    from engine.checkpoint import latest_valid, step_directory

    last = step_directory(checkpoints, config.total_steps)
    return last.exists() and latest_valid(checkpoints)[0] == last


def _finish(config: RunConfig, directory: Path, tokenizer: Tokenizer, console: Console) -> RunResult:
    """Export the final checkpoint unless that is done, and print the summary."""
    from engine.checkpoint import step_directory
    from engine.export import export_hf

    run = RunDirectory(directory)
    export = run.export
    is_new = not export.exists()
    if is_new:
        with console.status("exporting"):
            partial = partial_path(export)
            shutil.rmtree(partial, ignore_errors=True)
            export_hf(step_directory(run.checkpoints, config.total_steps), partial, tokenizer)
            partial.rename(export)
        record(directory, Exported(step=config.total_steps, path=export.name))
    # The event is also missing where a kill or a full disk came between it and the export.
    if is_new or state_of(read_events(directory)) != "finished":
        record(directory, Finished(step=config.total_steps))
    print_summary(console, config, directory, export, write_report(directory), tokenizer.mask_token)
    return RunResult(config.total_steps, finished=True)
