"""The runs of a study: each is a `detour-train` process of its own, all on one Ray cluster."""

from __future__ import annotations

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

import detour_train
from configs.errors import InputError, RunFailedError
from configs.files import exclusive_lock
from configs.load import dump_config
from configs.schema import RunConfig
from launcher.cluster import connect
from launcher.exits import BAD_INPUT, DONE, STOPPED
from launcher.nodes import alive_nodes
from launcher.preflight import possible_topologies
from monitoring.run_directory import RunDirectory

RELEASE_SECONDS = 90
"""Seconds that the orphaned run of a killed study may take to save and release its directory."""
# By name and with -P: neither Python nor a process that it spawns imports from the working directory.
TRAIN = (sys.executable, "-P", "-m", "detour_train", "train", "--stop-with-parent")


class Trials:
    """Runs jobs on the cluster this process belongs to, or on a local cluster that the first job starts.

    Args:
        stack: Closes the connection to the cluster.
        at_once: Fine-tunings of one call that run together; None: as many as the cluster holds.
    """

    def __init__(self, stack: ExitStack, at_once: int | None) -> None:
        self._stack = stack
        self._address: str | None = None
        self._at_once = at_once
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = False

    def room(self, config: RunConfig) -> int:
        """Return how many runs of this configuration the cluster holds at once. Main thread only.

        Raises:
            InputError: It holds not even one.
        """
        self._connect()
        smallest = possible_topologies(config)[-1]
        nodes = alive_nodes()
        slots = sum((node.gpus if smallest.gpu else node.cpus) // smallest.per_node for node in nodes)
        if slots < smallest.nodes:
            present = ", ".join(f"{node.cpus} CPUs and {node.gpus} GPUs" for node in nodes)
            raise InputError(
                f"cluster.workers_per_node: no room for {smallest}; the nodes have {present}",
                key="cluster.workers_per_node",
                code="no-room",
            )
        return slots // smallest.nodes

    def train(self, config: RunConfig, directory: Path) -> bool:
        """Run `detour-train` to its end, with its output in `directory`.log; return False if it was stopped early.

        Raises:
            InputError: `detour-train` found bad input.
            RunFailedError: `detour-train` failed.
        """
        address = self._connect()
        directory.parent.mkdir(parents=True, exist_ok=True)
        recipe, log = directory.with_name(f"{directory.name}.yaml"), directory.with_name(f"{directory.name}.log")
        recipe.write_text(dump_config(config), encoding="utf-8")
        _wait_until_released(directory)
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*TRAIN, str(recipe), "--output", str(directory)],
                env={**os.environ, "RAY_ADDRESS": address},
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._running.add(process)
            if self._stopping:
                process.send_signal(signal.SIGTERM)
            _, errors = process.communicate()
            self._running.discard(process)
            output.write(errors)
        message = errors.strip().rpartition("error: ")[2]
        if process.returncode == BAD_INPUT:
            raise InputError(message, code="trial-refused")
        if process.returncode not in (DONE, STOPPED):
            last_line = message.splitlines()[-1] if message else f"exit code {process.returncode}"
            raise RunFailedError(f"{last_line}; see {log}")
        return process.returncode == DONE

    def fine_tune(self, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        """Call `function` for each job, as a Ray task with one device each; yield the results as they come.

        Raises:
            RunFailedError: A fine-tuning failed, or the study was stopped.
        """
        if not jobs:
            return
        self._connect()
        device = {"num_gpus": 1} if any(node.gpus for node in alive_nodes()) else {"num_cpus": 1}
        task = ray.remote(max_retries=2, **device)(detour_train.call)
        waiting = list(jobs)
        running: list[Any] = []
        while waiting or running:
            while waiting and (self._at_once is None or len(running) < self._at_once):
                running.append(task.remote(function, waiting.pop(0)))
            done, running = ray.wait(running, num_returns=1, timeout=1.0)
            if self._stopping:
                for unfinished in done + running:
                    ray.cancel(unfinished, force=True)
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
            signal.signal(signal.SIGTERM, handler)  # Ray has installed a handler that ends the process
            self._address = os.environ.get("RAY_ADDRESS") or str(ray.get_runtime_context().gcs_address)
        return self._address


@contextmanager
def open_trials(at_once: int | None = None) -> Iterator[Trials]:
    """Open `Trials`, and leave the cluster with the context."""
    with ExitStack() as stack:
        yield Trials(stack, at_once)


def _wait_until_released(directory: Path) -> None:
    """Wait for the orphaned run of a killed study, which saves before it ends."""
    lock = RunDirectory(directory).lock
    deadline = time.monotonic() + RELEASE_SECONDS
    while lock.exists() and time.monotonic() < deadline:
        try:
            with exclusive_lock(lock, wait=False):
                return
        except BlockingIOError:
            time.sleep(0.5)
