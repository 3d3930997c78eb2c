"""`batch.micro: auto` on a GPU: finds the largest micro-batch that fits, without running out of memory.

The memory of a step is linear in the rows of its micro-batch: weights, moments and gradients, plus a constant per row.
Two small micro-batches give the line. On a CPU `engine.parallel.plan` decides, because larger ones are no faster there.
The choice is remembered for other runs on this host, and kept in the run's checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from transformers import ModernBertConfig

from configs.errors import InputError
from configs.files import write_json
from configs.schema import RunConfig
from configs.spans import PhaseSpan
from datapipe.batch import IGNORE, MicroBatch, Origin
from engine import device
from engine.megatron.fp8_state import preserve_fp8_state
from engine.modernbert.config import DropoutRates, resolve_dropout
from engine.parallel import Layout, micro_setting
from engine.step import StepRunner, to_device_batch

REMEMBERED = Path("~/.cache/detour/micro-batches.json")
MEMORY_SHARE = 0.9
"""Share of the device's memory that a step may take. Fragments and batches of other lengths need the rest."""


class Probe(Protocol):
    """Measures the device memory of a step."""

    def total(self) -> float:
        """Return the bytes of the device."""

    def held(self) -> float:
        """Return the bytes in use before any step."""

    def peak(self, rows: int) -> float:
        """Return the peak bytes of a step on micro-batches of `rows` rows; all ranks call it together."""


@dataclass(frozen=True)
class GpuProbe:
    """Measures steps on the costliest batches. They train nothing: their gradients are dropped, FP8 scaling restored.

    The costliest row is one document of full length with a label at every position.
    """

    runner: StepRunner
    sequence_length: int
    token_id: int
    """Any token; rows are made of it."""
    num_micro_batches: int
    """As many as the first pipeline stage keeps at once."""
    dropout: DropoutRates | None
    """Dropout of the training."""

    def total(self) -> float:
        """Return the bytes of the device."""
        return float(device.total_memory_bytes())

    def held(self) -> float:
        """Return the bytes of weights, gradients and moments, which Megatron allocates before the first step."""
        return float(torch.cuda.memory_allocated())

    def peak(self, rows: int) -> float:
        """Return the peak bytes of a step on micro-batches of `rows` rows; all ranks call it together."""
        ids = np.full(rows * self.sequence_length, self.token_id, np.int64)
        labels = ids.copy()
        labels[self.sequence_length - 1 :: self.sequence_length] = IGNORE
        ends = np.arange(0, len(ids) + 1, self.sequence_length, dtype=np.int32)
        torch.cuda.empty_cache()  # because unused blocks of other sizes would count
        torch.cuda.reset_peak_memory_stats()
        origins = tuple(Origin(0, number, ()) for number in range(rows))
        batch = to_device_batch(MicroBatch(ids, labels, ends, len(ids), "clm", origins), self.dropout)
        with preserve_fp8_state(self.runner.model):
            self.runner.forward_backward([batch] * self.num_micro_batches)
        return float(torch.cuda.max_memory_reserved())


def fit(probe: Probe, rows: int, key: str, before: int | None, remembered: Path = REMEMBERED) -> int:
    """Choose the largest micro-batch that fits every rank's device; all ranks call it together.

    Args:
        probe: Measures steps that are tried.
        rows: Sequences of a global batch per data-parallel rank.
        key: `identity` of the run and the device.
        before: The choice for this key in the run's checkpoint. It stays, because other sizes round differently.
        remembered: Rank 0's file of choices by other runs; a choice for the same key is taken from there.

    Returns:
        Rows of a micro-batch, the same on every rank.
    """
    if before is not None:
        return before
    path = remembered.expanduser()
    known: list[int | None] = [_remembered(path).get(key) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(known)
    if known[0] is not None:
        return known[0]
    size = _smallest(largest_that_fits(rows, probe.held(), probe.peak, MEMORY_SHARE * probe.total(), _smallest))
    if dist.get_rank() == 0:
        with suppress(OSError):  # the next run measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {**_remembered(path), key: size})
    return size


def largest_that_fits(
    rows: int, held: float, peak: Callable[[int], float], room: float, agreed: Callable[[int], int]
) -> int:
    """Find the largest divisor of `rows` whose peak bytes stay within `room`, by the line through the two smallest.

    Args:
        rows: Sequences per data-parallel rank.
        held: Bytes in use before any step.
        peak: Peak bytes of a step, by rows of its micro-batch.
        room: Bytes that a step may take.
        agreed: The smallest of all ranks' values, because all ranks must try the same sizes.

    Returns:
        At least 1, which has been tried.
    """
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    if len(sizes) == 1:
        return 1
    first = peak(1)
    # The first row's cost is an upper bound per row, because it includes the scratch memory.
    if not agreed(int(held + sizes[1] * (first - held) <= room)):
        return 1
    slope = max(1.0, (peak(sizes[1]) - first) / (sizes[1] - 1))
    return max(size for size in sizes if size == 1 or first + slope * (size - 1) <= room)


def identity(config: RunConfig, span: PhaseSpan, architecture: ModernBertConfig, layout: Layout, fp8: Any) -> str:
    """Hash everything that decides how much memory a row takes, and how much there is.

    Args:
        config: The run's configuration.
        span: The phase; its sequence length and batch count.
        architecture: The model's configuration.
        layout: The parallel layout; its micro-batch does not count.
        fp8: Megatron's FP8 format; None without FP8.
    """
    sizes = (layout.tensor, layout.pipeline, layout.data, layout.sequence)
    parts: list[Any] = [device.name(), device.total_memory_bytes(), torch.__version__, sizes]
    parts += [span.sequence_length, span.sequences, fp8, config.fp8_recipe, config.attention, config.deterministic]
    if config.batch.recompute != "none":
        parts.append(config.batch.recompute)
    if dropout := resolve_dropout(config, architecture):
        parts.append(dropout[1:])
    shape = json.dumps(architecture.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(repr([*parts, shape]).encode()).hexdigest()[:24]


def too_large(config: RunConfig, place: str, detail: object) -> InputError:
    """Return the error of a micro-batch that does not fit, with the remedies that are left.

    Args:
        config: The run's configuration.
        place: The GPU, for people.
        detail: The numbers.
    """
    remedies = ["lower data.sequence_length", "raise parallel.tensor or parallel.pipeline"]
    one_row = all(micro_setting(config, span)[1] in (1, "auto") for span in config.spans)
    if not one_row:
        remedies.insert(0, "lower batch.micro")
    if config.batch.recompute == "none":
        remedies.insert(0, "set batch.recompute=full (`recompute: full`), which keeps one input per layer")
    longest = max(span.sequence_length for span in config.spans)
    rows = "one packed sequence" if one_row else f"a micro-batch ({config.batch.micro})"
    return InputError(
        f"batch.micro: {rows} of up to {longest} tokens does not fit {place}; {', or '.join(remedies)} ({detail})",
        key="batch.micro",
        code="gpu-out-of-memory",
    )


def _smallest(value: int) -> int:
    """Return the smallest of all ranks' values."""
    smallest = torch.tensor([value], device=device.device())
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest.item())


def _remembered(path: Path) -> dict[str, int]:
    try:
        choices: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return choices
