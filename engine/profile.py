"""Where the time of a training step goes: a table by part of the step, and torch's trace of the operations."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from configs.schema import RunConfig
from engine import device
from engine.megatron import cpu

WARMUP = 2
"""Steps before the measured ones."""


class _Clock:
    """Seconds spent in named parts, the device's work included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with torch.profiler.record_function(f"detour: {name}"):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def profile(config: RunConfig, output: Path, steps: int = 5) -> str:
    """Train `steps` steps of the first phase in this process alone, after a warm-up; the table, as text.

    Writes `trace.json` (chrome://tracing, ui.perfetto.dev) of one more step to `output`. Logging and checkpoints are
    left out: weights are not kept, and an old run's are not touched.
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
    from engine.megatron.optimizer import set_learning_rate
    from engine.megatron.optimizer import step as optimizer_step
    from engine.objectives import objective_of
    from engine.setup import open_trainer
    from engine.step import batches, forward_backward

    trainer = open_trainer(config, scratch)
    objective = objective_of(config.phases[0], trainer.tokenizer, config.data.seed)
    data = batches(trainer, objective, 0, WARMUP + steps + 1, None)
    clock, tokens = _Clock(), 0

    def one_step() -> int:
        with clock.part("waiting for data"):
            batch = next(data)
        set_learning_rate(trainer.optimizer, trainer.schedule.learning_rate(batch.step), config.optimizer)
        with clock.part("forward and backward"):
            forward_backward(trainer, batch.staged)
        with clock.part("optimizer"):
            trainer.frozen.clear_gradients()
            optimizer_step(trainer.optimizer)
        return sum(micro.tokens for micro in batch.micro_batches)

    with closing(trainer), closing(data):
        for _ in range(WARMUP):
            one_step()
        clock.seconds.clear()
        started = time.perf_counter()
        for _ in range(steps):
            tokens += one_step()
        total = time.perf_counter() - started
        shares = dict(clock.seconds)
        with torch.profiler.profile() as traced:
            one_step()
    output.mkdir(parents=True, exist_ok=True)
    traced.export_chrome_trace(str(output / "trace.json"))
    shares["everything else"] = total - sum(shares.values())
    lines = [f"{device.name()}: {total / steps:.3f} s a step, {tokens / total:,.0f} real tokens/s"]
    lines += [f"  {name:<22}{1e3 * part / steps:>10.1f} ms {part / total:>7.1%}" for name, part in shares.items()]
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return "\n".join([*lines, traced.key_averages().table(sort_by=order, row_limit=15)])
