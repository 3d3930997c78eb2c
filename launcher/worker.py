"""A worker process of a run: the Ray actor that holds a device and calls the trainer."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray

from configs.errors import InputError
from configs.schema import RunConfig
from configs.versions import code_files, compared_versions
from launcher.claim import token_of
from launcher.stacks import answer_requests
from monitoring.run_directory import RunDirectory

STOP = "detour-stop"
"""Key in the store of the process group: its value asks rank 0 to stop, and says why."""
GRACE_SECONDS = 60
"""Seconds that the process group waits for a hanging rank beyond `cluster.hang_timeout`.

The launcher notices first, because it can name the rank.
"""

END_SECONDS = 60.0
"""Most seconds that a spare waits for the end of the workers it replaces."""


@dataclass(frozen=True)
class RunResult:
    """How training ended without failing. The engine has a class of its own, which a driver need not import."""

    step: int
    """Completed steps, all saved in a checkpoint."""
    finished: bool
    reason: str | None = None
    """Why training stopped early."""


@dataclass(frozen=True)
class WorkerInfo:
    """Location of a worker, as Ray placed it."""

    node: str
    """Ray's id of the node."""
    address: str
    gpus: tuple[str, ...]
    """Device numbers, or names of MIG slices."""
    files: dict[str, str] = field(default_factory=dict)
    """`code_files` of the node."""
    packages: dict[str, str] = field(default_factory=dict)
    """`compared_versions` of the node."""
    pid: int = 0


@dataclass(frozen=True)
class RankAssignment:
    """A worker's part in the process group."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    gpus: tuple[str, ...]
    """All GPUs of the run on this node, because NCCL reaches a neighbour's memory only if both see both devices."""
    threads: int


class Worker:
    """The actor. Ray calls its methods one after the other in the process's main thread."""

    def __init__(self, assignment: RankAssignment | None = None) -> None:
        self._assignment = assignment
        self._store: Any = None
        self._gpus: tuple[str, ...] = ()
        self._code_before: tuple[dict[str, str], dict[str, str]] | None = None
        """Files and packages when this worker became a spare."""
        self._predecessors: list[psutil.Process] = []

    def warm_up(self, gpus: tuple[str, ...], threads: int, predecessors: tuple[int, ...]) -> None:
        """Become a spare: import what training needs, and keep the GPUs that this worker may have to use.

        With GPUs only torch is imported, because other packages may open a GPU when they are imported.

        Args:
            gpus: Devices of the node's present workers.
            threads: Threads of a worker, which libraries read when they are imported.
            predecessors: Process ids of the node's present workers.
        """
        self._gpus = gpus
        self._code_before = code_files(), compared_versions()
        self._predecessors = [psutil.Process(pid) for pid in predecessors if psutil.pid_exists(pid)]
        os.environ["OMP_NUM_THREADS"] = str(threads)
        _ignore_warnings()
        if gpus:
            import torch  # noqa: F401
        else:
            _import_trainer()

    def locate(self, working_directory: str) -> WorkerInfo:
        """Change to `working_directory` if this node has it, and report where this worker runs.

        Raises:
            RuntimeError: Code of this node has changed since this worker became a spare, so it may be of two versions.
        """
        files, packages = code_files(), compared_versions()
        if self._code_before not in (None, (files, packages)):
            raise RuntimeError("code of this node has changed since the spare was started")
        if Path(working_directory).is_dir():
            os.chdir(working_directory)
        context = ray.get_runtime_context()
        gpus = self._gpus or tuple(context.get_accelerator_ids().get("GPU", ()))
        address = ray.util.get_node_ip_address()
        return WorkerInfo(context.get_node_id(), address, gpus, files, packages, os.getpid())

    def setup(self, assignment: RankAssignment, directory: Path, token: str) -> None:
        """Take a rank: redirect output to the rank's log, set threads and devices, and import the trainer.

        Args:
            assignment: The rank, and the devices it may use.
            directory: The run directory.
            token: Token of the run directory, as the launcher sees it.

        Raises:
            InputError: This node sees another directory under the same name.
        """
        address = ray.util.get_node_ip_address()
        if token_of(directory) != token:
            raise InputError(
                f"--output {directory} is not the same directory on node {address}; put it on storage all nodes share",
                key="--output",
                code="output-not-shared",
            )
        _redirect_output(RunDirectory(directory).logs / f"worker-{assignment.rank}.log")
        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger("engine").setLevel(logging.INFO)
        self._assignment = assignment
        _await_end(self._predecessors)
        os.environ.update(
            RANK=str(assignment.rank),
            WORLD_SIZE=str(assignment.size),
            LOCAL_RANK=str(assignment.local_rank),
            LOCAL_WORLD_SIZE=str(assignment.local_size),
            OMP_NUM_THREADS=str(assignment.threads),
            TORCH_FR_BUFFER_SIZE="2000",  # NCCL's flight recorder: the latest collectives, for `launcher.stacks`
            CUDA_DEVICE_MAX_CONNECTIONS="1",  # Megatron's overlap of tensor-parallel work relies on the launch order
        )
        if assignment.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(assignment.gpus)
        if interface := _interface_of(address):  # Ray reaches the other nodes through it
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        _ignore_warnings()
        import torch

        torch.set_num_threads(assignment.threads)
        if torch.cuda.is_available():
            torch.cuda.set_device(assignment.local_rank)
        _import_trainer()

    def open_store(self, address: str) -> int:
        """Open the store of the process group on rank 0, and return its port."""
        import torch.distributed as dist

        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def train(self, config: RunConfig, directory: Path, address: str, port: int) -> RunResult:
        """Join the process group and train to the end, or until asked to stop.

        Args:
            config: Configuration of the run.
            directory: The run directory.
            address: Host of the process group's store.
            port: Port of the store.

        Raises:
            InputError: The micro-batch does not fit the GPU, or the trainer found bad input.
        """
        import torch
        import torch.distributed as dist

        from engine.micro_batch import too_large
        from engine.trainer import train

        own = self._assignment
        assert own is not None, "setup comes first"
        store: Any = self._store if own.rank == 0 else dist.TCPStore(address, port, is_master=False)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        patience = timedelta(seconds=config.cluster.hang_timeout + GRACE_SECONDS)
        dist.init_process_group(backend, store=store, rank=own.rank, world_size=own.size, timeout=patience)
        answer_requests(dist.TCPStore(address, port, is_master=False), own.rank, directory)
        try:
            outcome = train(config, directory, lambda: store.get(STOP).decode() if store.check([STOP]) else None)
        except torch.OutOfMemoryError as error:
            raise too_large(config, f"the GPU of rank {own.rank}", error) from error
        dist.barrier()  # a rank must not leave while another still waits for it
        dist.destroy_process_group()
        return RunResult(outcome.step, outcome.finished, outcome.reason)


def _await_end(processes: Sequence[psutil.Process]) -> None:
    """Wait until the workers that a spare replaces have ended, because they may still write or hold GPU memory.

    A new process comes seconds later, after its imports.
    """
    _, alive = psutil.wait_procs([one for one in processes if not _is_zombie(one)], timeout=END_SECONDS)
    if alive := [one for one in alive if not _is_zombie(one)]:
        pids = ", ".join(str(one.pid) for one in alive)
        logging.getLogger(__name__).warning("earlier workers still run after %.0f s: %s", END_SECONDS, pids)


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _ignore_warnings() -> None:
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")  # they would hide ours


def _import_trainer() -> None:
    from engine.megatron import cpu

    cpu.install()
    import engine.trainer  # noqa: F401


def _interface_of(address: str) -> str | None:
    """Return the name of this node's network interface that has the address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family in (socket.AF_INET, socket.AF_INET6) and entry.address == address for entry in entries):
            return name
    return None


def _redirect_output(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
