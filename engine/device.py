"""The device that a process trains on, and its abilities."""

from __future__ import annotations

import functools
import math
import os
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import psutil
import torch

_GPU_PEAK = {  # dense bf16 FLOP/s by NVIDIA's data sheets; FP8 is twice as fast on all of them
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}

PEAK_SECONDS = 0.3
"""Time spent on timing products where no data sheet gives the peak. Beside other programs the first ones are slow."""


def device() -> torch.device:
    """Return this process's device. The launcher or LOCAL_RANK gives a GPU worker exactly one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def to_device(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    """Return the tensor on a device. A copy to a GPU starts from pinned memory, so the host does not wait for it."""
    if target.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host, which waits for it only when it reads it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._arrival = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrival:
            self._arrival.record()

    def read(self) -> list[float]:
        """Wait for the values of the [n] tensor and return them."""
        if self._arrival:
            self._arrival.synchronize()
        values: list[float] = self._tensor.tolist()
        return values


@functools.cache
def compiles_kernels() -> bool:
    """Return whether the model's Triton kernels can be compiled here: there is a GPU, and nothing is missing.

    Ask at the first operation, and not before: the question initialises CUDA.
    """
    return torch.cuda.is_available() and kernels_lack() is None


def kernels_lack() -> str | None:
    """Return the missing package without which Triton cannot compile its launchers; None where nothing is missing."""
    if not (shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")):
        return "gcc"
    return None if Path(sysconfig.get_path("include"), "Python.h").is_file() else "python3-dev"


def use_deterministic_algorithms() -> None:
    """Make GPU kernels of torch, cuBLAS and Transformer Engine add in a fixed order; call it before the first of them.

    torch then raises an error at an operation that has no such kernel.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)
    # It would cost a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def name() -> str:
    """Return the model of the device, for people."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device()))
    return f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def memory_bytes() -> int:
    """Return the memory of this process: the allocator's peak on a GPU, the resident set on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def total_memory_bytes() -> int:
    """Return the memory of the device, in use or not."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device()).total_memory)
    return int(psutil.virtual_memory().total)


def utilization() -> float:
    """Return the share of the last second, by NVML, in which the GPU ran a kernel; NaN without GPU or NVML."""
    if not torch.cuda.is_available():
        return math.nan
    try:
        return torch.cuda.utilization(device()) / 100
    except (ModuleNotFoundError, RuntimeError):  # nvidia-ml-py is not installed, or the driver does not answer
        return math.nan


class Stopwatch:
    """Adds up the time between `start` and `stop`; runs from its construction.

    Args:
        on_device: Measure a GPU's own time, not the host's time to launch the kernels.
    """

    def __init__(self, *, on_device: bool = False) -> None:
        self._on_device = on_device and torch.cuda.is_available()
        self._marks = [self._mark()]
        """Times of start and stop in turn: seconds, or CUDA events."""

    @property
    def runs(self) -> bool:
        """Whether it is started and not stopped."""
        return len(self._marks) % 2 == 1

    def stop(self) -> None:
        """End the current interval."""
        assert self.runs
        self._marks.append(self._mark())

    def start(self) -> None:
        """Begin another interval."""
        assert not self.runs
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """Return the sum of the intervals; one that still runs counts up to now."""
        marks = [*self._marks, self._mark()] if self.runs else self._marks
        return sum(map(self._between, marks[::2], marks[1::2]))

    def _between(self, begin: Any, end: Any) -> float:
        if not self._on_device:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def _mark(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@functools.cache
def peak_flops(precision: str) -> float:
    """Return the device's peak FLOP/s in a precision: by data sheet on a known GPU, else the best of many matmuls."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(device())
        for key, peak in _GPU_PEAK.items():
            if all(word in gpu for word in key.split()):
                return peak * {"fp8": 2.0, "fp32": 0.5}.get(precision, 1.0)  # TF32 runs at half the bf16 rate
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    size = 4096 if torch.cuda.is_available() else 1024
    a = torch.randn(size, size, device=device(), dtype=dtype)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < PEAK_SECONDS:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
