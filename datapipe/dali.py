"""The batches of the NumPy backend, made by NVIDIA DALI's operators; on the GPU if there is one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from datapipe.batch import IGNORE, MicroBatch, PackedSequence, collate
from datapipe.identifiers import with_marks
from datapipe.targets import Masked, Targets, row_keys, threshold

try:
    from nvidia.dali import Pipeline, fn, types
except ImportError:
    Pipeline = None


_log = logging.getLogger(__name__)

TABLE = 1 << 16
"""Largest lookup table of DALI, in entries."""
KEYS = ("choice", "action", "draw")
"""Inputs of the pipeline: the three numbers of `targets.row_keys`."""


def require_dali() -> None:
    """Raise InputError if DALI is not installed."""
    if Pipeline is None:
        raise InputError(
            "data.backend: DALI is not installed; pip install 'detour-train[dali]', or choose numpy",
            key="data.backend",
            code="not-installed",
        )


class DaliBatches:
    """Makes micro-batches in a DALI pipeline that the exact streams feed.

    On a GPU, `inputs` and `labels` are int64 torch tensors there. On the CPU they are NumPy arrays.

    Args:
        targets: Objective.
        micro_batch_size: Rows per micro-batch.
        length: Tokens per row.
        pad_id: Padding token.
        device: GPU, or None for the CPU.

    Raises:
        InputError: DALI is not installed.
    """

    def __init__(self, targets: Targets, micro_batch_size: int, length: int, pad_id: int, device: int | None) -> None:
        require_dali()
        self._targets, self._device = targets, device
        if device is None:
            _log.warning(
                "data.backend: dali is made for GPUs; on a CPU numpy makes the same batches 4 to 8 times faster"
            )
        self._positions = np.arange(length, dtype=np.uint32)
        # No queue inside the pipeline, because the loader's thread already works ahead.
        self._pipeline = Pipeline(micro_batch_size, 2, device, exec_async=False, exec_pipelined=False)
        with self._pipeline:
            ids = fn.pad(self._source("ids", types.INT64), fill_value=pad_id, axes=(0,), shape=(length,))
            if isinstance(targets, Masked):
                outputs = self._masked(ids, targets)
            else:
                labels = self._source("labels", types.INT64)
                outputs = ids, fn.pad(labels, fill_value=IGNORE, axes=(0,), shape=(length,))
            self._pipeline.set_outputs(*outputs)
        self._pipeline.build()

    def __call__(self, batches: Sequence[Sequence[PackedSequence]], step: int = 0) -> list[MicroBatch]:
        """Make one micro-batch from each list of rows."""
        micro_batches = []
        for rows in batches:
            self._feed(rows, step)
            inputs, labels = self._pipeline.run()
            micro_batches.append(collate(rows, self._flat(inputs), self._flat(labels), self._targets.objective))
        return micro_batches

    def _source(self, name: str, dtype: Any) -> Any:
        node = fn.external_source(name=name, dtype=dtype, ndim=1)
        return node if self._device is None else node.gpu()

    def _feed(self, rows: Sequence[PackedSequence], step: int) -> None:
        if isinstance(self._targets, Masked):
            ids = [with_marks(row.ids, row.marked)[: sum(row.lengths)].astype(np.int64) for row in rows]
            self._pipeline.feed_input("ids", ids)
            keys = [row_keys(self._targets.seed, row) for row in rows]
            for number, name in enumerate(KEYS):
                self._pipeline.feed_input(name, [key[number : number + 1] for key in keys])
            self._pipeline.feed_input("positions", [self._positions] * len(rows))
            rate = np.array([threshold(self._targets.rate_at(step))], np.uint32)
            self._pipeline.feed_input("rate", [rate] * len(rows))
            if self._targets.starts_word is not None:
                self._pipeline.feed_input("units", list(self._targets.units(rows)))
        else:
            for name, arrays in zip(("ids", "labels"), self._targets(rows, step), strict=True):
                unpadded = [ids[: sum(row.lengths)] for row, ids in zip(rows, arrays, strict=True)]
                self._pipeline.feed_input(name, unpadded)

    def _masked(self, ids: Any, targets: Masked) -> tuple[Any, Any]:
        """Apply the arithmetic of `Masked.__call__` to whole rows; marked ids come by `with_marks`."""
        may_be_label = ids >= 0
        ids = _where(may_be_label, ids, -1 - ids)
        positions = self._source("positions", types.UINT32)
        units = positions if targets.starts_word is None else self._source("units", types.UINT32)
        places = zip(KEYS, (units, positions, positions), strict=True)
        choice, action, draw = (_hashes(self._source(name, types.UINT32), place) for name, place in places)
        chosen = may_be_label & (choice < self._source("rate", types.UINT32))
        chosen &= _look_up(ids, targets.maskable) != 0  # the padding token is not maskable
        masked = chosen & (action < _uint32(threshold(targets.split[0])))
        randomised = chosen & (action < _uint32(threshold(sum(targets.split[:2]))))  # where it is not masked
        ranks = fn.cast(draw, dtype=types.UINT64) * types.Constant(len(targets.ordinary), types.UINT64)
        replacement = _look_up(fn.cast(ranks >> types.Constant(32, types.UINT64), dtype=types.INT64), targets.ordinary)
        inputs = _where(masked, targets.mask_id, _where(randomised, replacement, ids))
        return inputs, _where(chosen, ids, IGNORE)

    def _flat(self, output: Any) -> Any:
        """Copy `[rows, length]` to `[rows * length]`, because DALI reuses its buffers."""
        if self._device is None:
            return np.array(output.as_tensor()).reshape(-1)
        import torch

        # A stream of its own can be waited for; the training's stream has steps of work queued.
        copying = torch.cuda.Stream(self._device)
        with torch.cuda.stream(copying):
            copied = torch.from_dlpack(output.as_tensor()).reshape(-1).clone()
        copying.synchronize()
        copied.record_stream(torch.cuda.default_stream(self._device))  # the stream that uses it
        return copied


def _hashes(key: Any, positions: Any) -> Any:
    """`targets.position_hashes` in DALI's operators; key is `[1] uint32`."""
    return _mix(_mix(positions * _uint32(0x9E3779B9) + key) + key)


def _mix(x: Any) -> Any:
    x = (x ^ (x >> _uint32(16))) * _uint32(0x7FEB352D)
    x = (x ^ (x >> _uint32(15))) * _uint32(0x846CA68B)
    return x ^ (x >> _uint32(16))


def _look_up(places: Any, table: NDArray[Any]) -> Any:
    """Return the table's entries at int64 places, as int64; 0 outside of it. DALI holds the entries in fp32."""
    parts = [
        fn.lookup_table(
            places - first,
            keys=list(range(len(table[first : first + TABLE]))),
            values=table[first : first + TABLE].astype(float).tolist(),
            dtype=types.INT64,
        )
        for first in range(0, len(table), TABLE)
    ]
    total = parts[0]
    for part in parts[1:]:  # a place lies in one part, and the others have no key for it
        total += part
    return total


def _where(condition: Any, yes: Any, no: Any) -> Any:
    """Select elements as int64, because DALI has no ternary operator."""
    choice = fn.cast(condition, dtype=types.INT64)
    return choice * yes + (1 - choice) * no


def _uint32(value: Any) -> Any:
    # Not a Python number, because it would widen the arithmetic to int64.
    return types.Constant(int(value), types.UINT32)
