"""The accelerator a process trains on, and what it can do."""

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

_GPU_PEAK = {  # dense bf16 FLOP/s by NVIDIA's data sheets; FP8 is twice that on all of them
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}

PEAK_SECONDS = 0.3
"""For which products are timed where no data sheet says the peak: among other programs the first few are slow."""


def device() -> torch.device:
    """This process's device; a GPU worker is given exactly one by its launcher or by LOCAL_RANK."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def moved(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """The tensor on a device. To a GPU from pinned memory: that copy does not wait for the kernels before it, so the
    host goes on giving them work.
    """
    if where.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(where)
    return tensor.pin_memory().to(where, non_blocking=True)


def compiles_kernels() -> bool:
    """Whether the Triton kernels of the model can be built here: there is a GPU, and what their launchers need."""
    return torch.cuda.is_available() and kernels_lack() is None


def kernels_lack() -> str | None:
    """The package without which Triton cannot compile its kernels' launchers."""
    if not (shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")):
        return "gcc"
    return None if Path(sysconfig.get_path("include"), "Python.h").is_file() else "python3-dev"


def name() -> str:
    """Model of the device, for people."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device()))
    return f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def memory_bytes() -> int:
    """Memory this process holds: on a GPU the allocator's, on a CPU the resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def total_memory_bytes() -> int:
    """Of the device, in use or not."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device()).total_memory)
    return int(psutil.virtual_memory().total)


def utilization() -> float:
    """Share of the last moments (NVML's: at most a second) in which the GPU ran a kernel; NaN without GPU or NVML."""
    if not torch.cuda.is_available():
        return math.nan
    try:
        return torch.cuda.utilization(device()) / 100
    except (ModuleNotFoundError, RuntimeError):  # nvidia-ml-py is not installed, or the driver keeps it to itself
        return math.nan


class Stopwatch:
    """Runs from its making, in seconds: on a GPU the device's own time, not that of launching the kernels."""

    def __init__(self) -> None:
        self._marks = [self._mark()]

    @property
    def runs(self) -> bool:
        return len(self._marks) % 2 == 1

    def stop(self) -> None:
        assert self.runs
        self._marks.append(self._mark())

    def start(self) -> None:
        assert not self.runs
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """While it ran; it is stopped."""
        return sum(map(self._between, self._marks[::2], self._marks[1::2]))

    def _between(self, begin: Any, end: Any) -> float:
        if isinstance(begin, float):
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def _mark(self) -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@functools.cache
def peak_flops(precision: str) -> float:
    """Peak FLOP/s of the device in a precision: the data sheet's on a known GPU, else the best of many matmuls."""
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
