"""The runs of a study: each an ordinary `detour-train` of its own, all on one Ray cluster."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

from configs.errors import InputError, RunFailedError
from configs.load import dump_config
from configs.schema import RunConfig
from launcher.cluster import alive_nodes, connect
from launcher.job import possible_shapes

PATIENCE_SECONDS = 90
"""How long the run of a study that was killed may take to let go of its directory."""
DONE, BAD_INPUT, STOPPED = 0, 2, 75
_PR_SET_PDEATHSIG = 1


class Trials:
    """Runs jobs on the cluster this process belongs to, or on one started here with the first of them."""

    def __init__(self, stack: ExitStack, at_once: int | None) -> None:
        """`at_once`: fine-tunings of one call that run together; None: as many as the cluster holds."""
        self._stack = stack
        self._address: str | None = None
        self._at_once = at_once
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = False

    def room(self, config: RunConfig) -> int:
        """How many runs like this one the cluster holds at once. InputError for none. Main thread only."""
        self._connect()
        shape = possible_shapes(config)[-1]  # the smallest it may have
        nodes = alive_nodes()
        places = sum((node.gpus if shape.gpu else node.cpus) // shape.per_node for node in nodes)
        if places < shape.nodes:
            has = ", ".join(f"{node.cpus} CPUs and {node.gpus} GPUs" for node in nodes)
            raise InputError(f"cluster.workers_per_node: no room for {shape}; the nodes have {has}")
        return places // shape.nodes

    def train(self, config: RunConfig, directory: Path) -> bool:
        """Run `detour-train` to its end; False where it was stopped early. Its output goes to `directory`.log."""
        address = self._connect()
        directory.parent.mkdir(parents=True, exist_ok=True)
        recipe, log = directory.with_name(f"{directory.name}.yaml"), directory.with_name(f"{directory.name}.log")
        recipe.write_text(dump_config(config), encoding="utf-8")
        _wait_until_free(directory)
        command = [
            sys.executable,
            "-P",  # the working directory is the user's: nothing is imported from it
            "-c",
            "import detour_train; detour_train.trial_main()",
            str(recipe),
            "--output",
            str(directory),
        ]
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, "RAY_ADDRESS": address},
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._running.add(process)
            if self._stopping:
                process.send_signal(signal.SIGTERM)
            _, complaint = process.communicate()
            self._running.discard(process)
            output.write(complaint)
        last = complaint.strip().rpartition("error: ")[2]
        if process.returncode == BAD_INPUT:
            raise InputError(last)
        if process.returncode not in (DONE, STOPPED):
            raise RunFailedError(f"{last.splitlines()[-1] if last else f'exit code {process.returncode}'}; see {log}")
        return process.returncode == DONE

    def fine_tune(self, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        """`function` of each job as Ray tasks with one device each; the results as they come."""
        if not jobs:
            return
        self._connect()
        device = {"num_gpus": 1} if any(node.gpus for node in alive_nodes()) else {"num_cpus": 1}
        remote = ray.remote(max_retries=2, **device)(function)
        waiting = list(jobs)
        running: list[Any] = []
        while waiting or running:
            while waiting and (self._at_once is None or len(running) < self._at_once):
                running.append(remote.remote(waiting.pop(0)))
            done, running = ray.wait(running, num_returns=1, timeout=1.0)
            if self._stopping:
                for task in done + running:
                    ray.cancel(task, force=True)
                raise RunFailedError("stopped before it was evaluated")
            try:
                for ready in done:
                    yield ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise RunFailedError(f"a fine-tuning failed: {str(error.cause).strip()}") from error

    def stop(self) -> None:
        """Ask the running jobs to save and end."""
        self._stopping = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def _connect(self) -> str:
        if self._address is None:
            handler = signal.getsignal(signal.SIGTERM)
            self._stack.enter_context(connect(local_workers=0))
            signal.signal(signal.SIGTERM, handler)  # Ray has set its own, which ends the process
            self._address = os.environ.get("RAY_ADDRESS") or str(ray.get_runtime_context().gcs_address)
        return self._address


@contextmanager
def open_trials(at_once: int | None = None) -> Iterator[Trials]:
    with ExitStack() as stack:
        yield Trials(stack, at_once)


def stop_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the study that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_free(directory: Path) -> None:
    """A run whose study was killed saves before it ends."""
    path = directory / ".lock"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while path.exists() and time.monotonic() < deadline:
        with path.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.5)
            else:
                return
