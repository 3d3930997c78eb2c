"""Measures the parts of a training step: a table by part, and torch's trace of the operations."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from configs.schema import RunConfig
from engine import device
from engine.device import Stopwatch
from engine.megatron import cpu

WARMUP = 2
"""Steps before the measured ones."""


def profile(config: RunConfig, output: Path, steps: int = 5) -> str:
    """Train `steps` steps of the first phase in this process alone, after a warm-up.

    Weights are not kept, and the checkpoints of a run are not touched.

    Args:
        config: The run's configuration.
        output: Folder for `trace.json` of one more step, for chrome://tracing or ui.perfetto.dev.
        steps: Measured steps.

    Returns:
        The table, as text.
    """
    cpu.install()
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return _profile(config, Path(scratch), output, steps)
    finally:
        dist.destroy_process_group()


def _profile(config: RunConfig, scratch: Path, output: Path, steps: int) -> str:
    from engine.build import build

    run = build(config, scratch)
    parts: dict[str, Stopwatch] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        """Time a named part of a step, the device's work included."""
        if name in parts:
            parts[name].start()
        else:
            parts[name] = Stopwatch()
        with torch.profiler.record_function(f"detour: {name}"):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        parts[name].stop()

    def one_step() -> int:
        with part("waiting for data"):
            batch = next(data)
        with part("forward and backward"):
            losses, _ = run.runner.forward_backward(batch.staged)
        with part("optimizer"):
            run.runner.optimizer_step(losses, run.schedule.learning_rate(batch.step))
        return sum(micro_batch.tokens for micro_batch in batch.micro_batches)

    span = run.schedule.spans[0]
    objective = run.begin_phase(span)
    with closing(run), closing(run.batches(span, objective, 0, WARMUP + steps + 1, None)) as data:
        for _ in range(WARMUP):
            one_step()
        parts.clear()
        whole = Stopwatch()
        tokens = sum(one_step() for _ in range(steps))
        whole.stop()
        seconds = {name: watch.seconds() for name, watch in parts.items()}
        with torch.profiler.profile() as traced:
            one_step()
    output.mkdir(parents=True, exist_ok=True)
    traced.export_chrome_trace(str(output / "trace.json"))
    total = whole.seconds()
    seconds["everything else"] = total - sum(seconds.values())
    lines = [f"{device.name()}: {total / steps:.3f} s per step, {tokens / total:,.0f} real tokens/s"]
    lines += [f"  {name:<22}{1e3 * spent / steps:>10.1f} ms {spent / total:>7.1%}" for name, spent in seconds.items()]
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return "\n".join([*lines, traced.key_averages().table(sort_by=order, row_limit=15)])
