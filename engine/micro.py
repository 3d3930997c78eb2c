"""`batch.micro: auto` on a GPU: the largest micro-batch that fits, found without running out of memory, and remembered.

The memory of a step is a line in the rows of its micro-batch: weights, moments and gradients, and so much a row. Two
small micro-batches give the line. On a CPU `engine.parallel.plan` decides: there larger ones are no faster.

What is tried trains nothing: its gradients are dropped, and delayed FP8 scaling forgets what it saw.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from datapipe.batch import IGNORE, MicroBatch
from engine import device
from engine.megatron.fp8_state import preserve_fp8_state
from engine.step import forward_backward, staged

if TYPE_CHECKING:
    from engine.setup import Trainer

REMEMBERED = Path("~/.cache/detour/micro-batches.json")
SHARE = 0.9
"""Of the device's memory, which a step may take: the rest is for fragments, and for what other lengths need."""


def fit_micro_batch(trainer: Trainer, before: Sequence[Any] | None, memory: Path = REMEMBERED) -> tuple[str, int]:
    """Rows of the largest micro-batch that fits every rank's device, and a key of what it depends on; all ranks call it
    together, before the first step.

    `before` is what this gave when the run's checkpoint was written: for the same key its size stays, since another one
    rounds otherwise. So does what `memory`, rank 0's file, remembers from other runs.
    """
    key, path = _identity(trainer), memory.expanduser()
    if before and before[0] == key:
        return key, int(before[1])
    known: list[int | None] = [_remembered(path).get(key) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(known)
    if known[0] is not None:
        return key, known[0]
    rows = trainer.layout.micro * trainer.layout.micro_batches
    room = SHARE * device.total_memory_bytes()
    with preserve_fp8_state(trainer.model):
        found = _smallest(
            largest_that_fits(rows, _held_bytes(), lambda size: _peak_bytes(trainer, size), room, _smallest)
        )
    if dist.get_rank() == 0:
        _remember(path, key, found)
    return key, found


def largest_that_fits(
    rows: int, held: float, peak: Callable[[int], float], room: float, agreed: Callable[[int], int]
) -> int:
    """The largest divisor of `rows` whose peak bytes stay within `room`, by the line through the two smallest ones.

    At least 1, which has been tried. `held`: bytes in use before any. `agreed`: the smallest of all ranks' answers,
    since a size is tried by all of them or by none.
    """
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    if len(sizes) == 1:
        return 1
    first = peak(1)
    # No row takes more than the first did, whose share has the scratch memory of all of them in it.
    if not agreed(int(held + sizes[1] * (first - held) <= room)):
        return 1
    slope = max(1.0, (peak(sizes[1]) - first) / (sizes[1] - 1))
    return max(size for size in sizes if size == 1 or first + slope * (size - 1) <= room)


def _smallest(value: int) -> int:
    """Of all ranks' values."""
    agreed = torch.tensor([value], device=device.device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return int(agreed.item())


def _held_bytes() -> float:
    """Weights, gradients and moments: Megatron makes room for all of them before the first step."""
    return float(torch.cuda.memory_allocated())


def _peak_bytes(trainer: Trainer, micro: int) -> float:
    """Of a step on the costliest batch there is: full rows of one document, all of whose positions pay; as many of them
    as a pipeline's first stage keeps at once.
    """
    length = trainer.config.data.sequence_length
    ids = np.full(micro * length, trainer.tokenizer.sep_id, np.int64)
    labels = ids.copy()
    labels[length - 1 :: length] = IGNORE
    ends = np.arange(0, micro * length + 1, length, dtype=np.int32)
    torch.cuda.empty_cache()  # blocks of another size's tensors would count, and be of no use
    torch.cuda.reset_peak_memory_stats()
    row = staged(MicroBatch(ids, labels, ends, micro * length), causal=True)
    forward_backward(trainer, [row] * trainer.layout.pipeline)
    return float(torch.cuda.max_memory_reserved())


def _identity(trainer: Trainer) -> str:
    """Of everything that decides how much memory a row takes, and how much there is."""
    run, layout = trainer.config, replace(trainer.layout, micro=0, micro_batches=0)
    parts: list[Any] = [device.name(), device.total_memory_bytes(), torch.__version__, repr(layout)]
    parts += [run.data.sequence_length, run.batch.sequences, trainer.model.config.fp8, run.fp8_recipe, run.attention]
    shape = json.dumps(trainer.architecture.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(repr([*parts, shape]).encode()).hexdigest()[:24]


def _remembered(path: Path) -> dict[str, int]:
    try:
        known: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def _remember(path: Path, key: str, micro: int) -> None:
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**_remembered(path), key: micro}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError:  # it is only found again the next time
        partial.unlink(missing_ok=True)
