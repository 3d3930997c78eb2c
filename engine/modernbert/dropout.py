"""Dropout by an integer hash instead of a random generator.

A hash of (seed, row, position in the row, layer, site, channel) decides about each element. A run trains on each row
once, so the row's number stands for the step as well. Ranks, micro-batches and restarts take no part in the hash.
Therefore every layout and every resume drops the same elements. CPUs and GPUs compute the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from datapipe.batch import Origin
from datapipe.targets import mix, position_hashes
from engine.device import to_device
from engine.modernbert.config import DropoutRates
from engine.modernbert.ops import drop

ATTENTION_OUTPUT, MLP = 0, 1
"""Sites of a layer."""


@dataclass(frozen=True)
class Dropout:
    """The elements that one micro-batch drops, at every site of the model."""

    rates: DropoutRates
    keys: Tensor
    """[T] int32, a hash of seed, row and position per token."""

    @classmethod
    def of_rows(cls, rates: DropoutRates, rows: Sequence[Origin], tokens: int, device: torch.device) -> Dropout:
        """Compute the keys of rows that lie end to end in T tokens. The rows have equal lengths."""
        words = [f"dropout {rates.seed} {row.stream} {row.number}".encode() for row in rows]
        row_keys = [np.frombuffer(hashlib.blake2b(word, digest_size=4).digest(), "<u4") for word in words]
        positions = np.arange(tokens // len(rows), dtype=np.uint32)
        keys = position_hashes(np.stack(row_keys), positions).reshape(-1)
        return cls(rates, to_device(torch.from_numpy(keys.view(np.int32)), device))

    def at(self, positions: Tensor) -> Dropout:
        """Return the dropout of the tokens at these positions alone, [Q] int64."""
        return replace(self, keys=self.keys[positions])

    def on_embedding(self, states: Tensor) -> Tensor:
        """Drop elements of the normalised embedding, [T, 1, hidden]."""
        return self._drop(states, self.rates.embedding, site=0)

    def on_attention_output(self, states: Tensor, layer: int) -> Tensor:
        """Drop elements of the attention's output, [T, 1, hidden], in layer 1, 2, ..."""
        return self._drop(states, self.rates.attention_output, 2 * layer + ATTENTION_OUTPUT)

    def on_gated_states(self, states: Tensor, layer: int) -> Tensor:
        """Drop elements between the matrices of the MLP, [T, 1, n], in layer 1, 2, ...

        A tensor-parallel rank has the n channels after those of the ranks before it.
        """
        first = parallel_state.get_tensor_model_parallel_rank() * states.shape[-1]
        return self._drop(states, self.rates.mlp, 2 * layer + MLP, first)

    def _drop(self, states: Tensor, rate: float, site: int, first_channel: int = 0) -> Tensor:
        if not rate:
            return states
        keys = self.keys
        if len(states) < len(keys):  # sequence parallelism: this rank has a share of the tokens
            keys = keys.chunk(len(keys) // len(states))[parallel_state.get_tensor_model_parallel_rank()]
        return drop(states, keys, int(mix(np.array([site + 1], np.uint32))[0]), first_channel, rate)
