"""A real Ray cluster of several nodes on this machine: one raylet per node, each on its own loopback address."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.launcher.toy import ROOT, environment

_numbers = itertools.count(11 + 35 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 3))
"""Numbers of loopback addresses and port ranges. Clusters may live side by side, also those of two test processes."""


@dataclass
class LoopbackNode:
    address: str
    id: str
    process: psutil.Popen
    """`ray start --block`, which ends when its raylet does."""


class LoopbackCluster:
    """Nodes, each on its own loopback address; the first is the head, with the job server."""

    def __init__(
        self, nodes: int, cpus: int = 1, path: Path | None = ROOT, python: Path | str = sys.executable
    ) -> None:
        """Start `nodes` nodes of `cpus` CPUs.

        Args:
            nodes: Number of raylets.
            cpus: CPUs of each node.
            path: Folder in which Python looks first, before Detour's own; None: Detour is installed for `python`.
            python: Interpreter that runs Ray.
        """
        self._cpus = cpus
        self._ray = [str(python), "-m", "ray.scripts.scripts"]
        self._python = str(python)
        self._folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: Unix socket paths end at 107 characters
        python_path = {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"} if path else {}
        self._environment = environment(None) | {
            **python_path,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_JOB_STOP_WAIT_TIME_S": "200",
        }
        self._log = (self._folder / "ray-start.txt").open("w")
        self._head, self._dashboard = "", 0
        self.nodes: list[LoopbackNode] = []
        try:
            for _ in range(nodes):
                self.add_node()
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a process that belongs to the cluster."""
        return self._environment | {"RAY_ADDRESS": self._head}

    @property
    def job_server(self) -> str:
        return f"http://127.0.0.1:{self._dashboard}"

    def add_node(self, path: Path | None = None) -> LoopbackNode:
        """Start a node and wait for it. `ray start` is repeated, because it may run out of time or lose a port.

        Args:
            path: Folder in which Python looks first on this node.
        """
        here = {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"} if path else {}
        number = next(_numbers)
        address = f"127.0.0.{number}"
        for _ in range(5):
            command = self._start_command(address, number)  # draws ports anew at each try
            process = psutil.Popen(command, env=self._environment | here, stdout=self._log, stderr=self._log)
            while process.poll() is None:
                ids = [entry["NodeID"] for entry in self._alive() if entry["NodeManagerAddress"] == address]
                if ids:
                    self.nodes.append(LoopbackNode(address, ids[0], process))
                    return self.nodes[-1]
                time.sleep(0.5)
        raise RuntimeError((self._folder / "ray-start.txt").read_text())

    def _start_command(self, address: str, number: int) -> list[str]:
        if self.nodes:
            role = [f"--address={self._head}"]
        else:
            port, self._dashboard = _free_ports(2)
            self._head = f"{address}:{port}"
            role = ["--head", f"--port={port}", f"--dashboard-port={self._dashboard}", "--include-dashboard=true"]
        first = 20000 + 100 * (number % 120)  # below the ephemeral ports, which begin at 32768
        services: tuple[str, ...] = ("node-manager", "object-manager", "metrics-export", "runtime-env-agent")
        services += ("dashboard-agent-listen", "dashboard-agent-grpc")
        return [
            *(*self._ray, "start", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={address}", f"--num-cpus={self._cpus}", f"--temp-dir={self._folder}"),
            *(f"--{name}-port={port}" for name, port in zip(services, _free_ports(len(services)), strict=True)),
            *(f"--min-worker-port={first}", f"--max-worker-port={first + 99}"),
            f"--object-store-memory={80 * 2**20}",
            *role,
        ]

    def kill_node(self, node: LoopbackNode) -> None:
        """Take a node away without notice, with everything that runs on it."""
        for process in [*_children(node.process), node.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.process.wait()

    def drain_node(self, node: LoopbackNode, seconds: int) -> None:
        """Give notice that a node will be taken away."""
        command = [*self._ray, "drain-node", f"--node-id={node.id}", f"--deadline-remaining-seconds={seconds}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot instance reclaimed"]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60)

    def workers(self) -> dict[psutil.Process, LoopbackNode]:
        """Map each training process to its node."""
        return {process: node for process, node in self._family() if _name(process).startswith("ray::Worker.tra")}

    def spares(self) -> list[psutil.Process]:
        """List the spare workers that are ready."""
        return [process for process, _ in self._family() if _name(process) == "ray::Worker"]

    def _family(self) -> list[tuple[psutil.Process, LoopbackNode]]:
        return [(process, node) for node in self.nodes for process in _children(node.process)]

    def job(self, command: str, *words: str | Path) -> str:
        """Run `ray job COMMAND` against the job server, and return its output."""
        line = [*self._ray, "job", command, f"--address={self.job_server}", *map(str, words)]
        return subprocess.run(
            line, env=self.environment, check=True, capture_output=True, text=True, timeout=300
        ).stdout

    def addresses(self) -> set[str]:
        """Return the addresses of the nodes that Ray counts as alive."""
        return {entry["NodeManagerAddress"] for entry in self._alive()}

    def close(self) -> None:
        for node in self.nodes:
            self.kill_node(node)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _alive(self) -> list[dict[str, Any]]:
        """List the alive nodes. Another process asks, because Ray connects a process to one cluster only."""
        ask = (
            "import json, ray, sys; ray.init(log_to_driver=False, logging_level='ERROR');"
            "print(json.dumps([node for node in ray.nodes() if node['Alive']]))"
        )
        command = [self._python, "-c", ask]
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:  # it waits for a head that is not up yet
            return []
        answers = [line for line in done.stdout.splitlines() if line.startswith("[{")]
        return json.loads(answers[0]) if answers else []


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


def _free_ports(count: int) -> list[int]:
    """Draw ports that differ, because all sockets are open until the last is drawn."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(server.getsockname()[1]) for server in servers]
