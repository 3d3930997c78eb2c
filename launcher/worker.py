"""One process of a run: the Ray actor that holds a device and calls the trainer."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray

from configs.errors import InputError
from configs.schema import RunConfig
from launcher.directory import token_of
from monitoring.run_directory import RunDirectory

STOP = "detour-stop"
"""In the store that the process group meets at: asks rank 0 to stop, and says why."""
GRACE_SECONDS = 60
"""How much longer than the launcher, which can name it, the process group waits for a rank that hangs."""


@dataclass(frozen=True)
class Ending:
    """How training ended without failing. Not the engine's own class, so that a driver need not import the engine."""

    step: int
    """Completed steps, all of them in a checkpoint."""
    finished: bool
    reason: str | None = None
    """Why it stopped early."""


@dataclass(frozen=True)
class Place:
    """Where a worker found itself."""

    node: str
    address: str
    gpus: tuple[str, ...]
    """Numbers, or names of MIG slices."""


@dataclass(frozen=True)
class Seat:
    """A worker's part in the process group."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    gpus: tuple[str, ...]
    """All that the run has on this node: NCCL reaches a neighbour's memory only where both see both devices."""
    threads: int


class Worker:
    """Its methods run one after the other in the process's main thread."""

    def place(self, working_directory: str) -> Place:
        if Path(working_directory).is_dir():
            os.chdir(working_directory)
        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids().get("GPU", ()))
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), gpus)

    def sit(self, seat: Seat, directory: Path, token: str) -> None:
        """Take a rank: output to its own log, threads and devices set, everything that training needs imported.

        `token`: that of the run directory, as the launcher sees it.
        """
        address = ray.util.get_node_ip_address()
        if token_of(directory) != token:
            raise InputError(
                f"--output {directory} is not the same directory on node {address}; put it on storage all nodes share"
            )
        _redirect_output(RunDirectory(directory).logs / f"worker-{seat.rank}.log")
        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger("engine").setLevel(logging.INFO)
        self._seat = seat
        os.environ.update(
            RANK=str(seat.rank),
            WORLD_SIZE=str(seat.size),
            LOCAL_RANK=str(seat.local_rank),
            LOCAL_WORLD_SIZE=str(seat.local_size),
            OMP_NUM_THREADS=str(seat.threads),
            CUDA_DEVICE_MAX_CONNECTIONS="1",  # Megatron's overlap of tensor-parallel work relies on the order it gives
        )
        if seat.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seat.gpus)
        if interface := _interface(address):  # the one that Ray found the other nodes by
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")  # theirs, about themselves; they drown ours
        import torch

        from engine.megatron import cpu

        torch.set_num_threads(seat.threads)
        if torch.cuda.is_available():
            torch.cuda.set_device(seat.local_rank)
        cpu.install()
        import engine.trainer  # noqa: F401

    def open_store(self, address: str) -> int:
        """On rank 0: open the store the process group meets at; its port."""
        import torch.distributed as dist

        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def train(self, config: RunConfig, directory: Path, address: str, port: int) -> Ending:
        """Join the process group and train to the end, or until asked to stop."""
        import torch
        import torch.distributed as dist

        from engine.trainer import train

        seat = self._seat
        store: Any = self._store if seat.rank == 0 else dist.TCPStore(address, port, is_master=False)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        patience = timedelta(seconds=config.cluster.hang_timeout + GRACE_SECONDS)
        dist.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.size, timeout=patience)
        try:
            outcome = train(config, directory, lambda: store.get(STOP).decode() if store.check([STOP]) else None)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"batch.micro: {config.batch.micro} does not fit the GPU of rank {seat.rank} at data.sequence_length "
                f"{config.data.sequence_length}; give a smaller batch.micro or data.sequence_length, or raise "
                f"parallel.tensor or parallel.pipeline ({error})"
            ) from error
        dist.barrier()  # no rank leaves while another still waits for it
        dist.destroy_process_group()
        return Ending(outcome.step, outcome.finished, outcome.reason)


def _interface(address: str) -> str | None:
    """The network interface of this node that has an address."""
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
