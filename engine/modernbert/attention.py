"""Packed documents and self-attention over them, causal or bidirectional by batch, local or global by layer.

The documents of a micro-batch lie end to end in one row of T tokens. No token sees another document. Local layers see
`local_attention / 2` tokens to each side (to the left only when causal), global layers the whole document.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from numpy.typing import NDArray
from torch import Tensor

from engine.device import to_device
from engine.modernbert.dropout import Dropout

BAND = 64
"""Queries that share one gathered window of keys, in a local layer on the CPU."""
GROUP = 256
"""Short neighbouring documents share one attention call of about this many tokens on the CPU."""
QUERY_MULTIPLE = 32
"""Rows of the last layer's products are a multiple of this on every rank, because products in MXFP8 ask for it."""


@dataclass(frozen=True)
class Queries:
    """The tokens whose states the loss needs. Keys and values of the last layer are of all tokens.

    Besides the positions with a label they are the first token of each document, because attention kernels differ on
    documents without a query. The last one is repeated up to a multiple of QUERY_MULTIPLE.
    """

    positions: Tensor
    """[Q] int64, ascending."""
    label_rows: Tensor
    """[N] int64, where `positions` has the positions with a label."""
    cu_seqlens: Tensor
    """[documents + 1] int32, bounds of each document's queries."""
    counts: tuple[int, ...]
    """Queries per document; their sum is Q."""

    @classmethod
    def at(cls, label_positions: NDArray[np.int64], ends: NDArray[np.int32], device: torch.device) -> Queries:
        """Choose the queries for positions that carry a label, in ascending order.

        Args:
            label_positions: [N], in ascending order.
            ends: [documents + 1], bounds of the documents.
            device: Device of the tensors.
        """
        chosen = np.union1d(label_positions, ends[:-1])
        multiple = QUERY_MULTIPLE * parallel_state.get_tensor_model_parallel_world_size()
        positions = np.pad(chosen, (0, -len(chosen) % multiple), mode="edge")
        bounds = np.searchsorted(positions, ends).astype(np.int32)
        rows = np.searchsorted(chosen, label_positions)
        tensors = [to_device(torch.from_numpy(array), device) for array in (positions, rows, bounds)]
        return cls(tensors[0], tensors[1], tensors[2], tuple(np.diff(bounds).tolist()))


class DocumentGroup(NamedTuple):
    """Neighbouring documents that share one attention call."""

    tokens: int
    queries: int
    mask: Tensor | None
    """[queries, tokens] bool, whether a query sees a key; None for a single document."""


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's packed-sequence parameters, and what else differs from batch to batch.

    The batch's objective decides whether attention is causal. An evaluation has no dropout.
    """

    causal: bool = False
    dropout: Dropout | None = None
    """The elements to drop; None without dropout."""
    lengths: tuple[int, ...] = ()
    """Tokens per document; their sum is T."""
    documents: Tensor = field(kw_only=True)
    """[T] int32, number of each token's document."""
    positions: Tensor = field(kw_only=True)
    """[T] int64, position of each token in its document."""
    queries: Queries | None = None
    """The tokens that the last layer computes; None for all."""
    _masks: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def from_lengths(
        cls,
        lengths: tuple[int, ...],
        causal: bool,
        device: torch.device,
        dropout: Dropout | None = None,
        label_positions: NDArray[np.int64] | None = None,
    ) -> PackedDocuments:
        """Build the parameters of documents that lie end to end.

        NumPy does it, because torch's threads would wait for each other on busy cores.

        Args:
            lengths: Tokens per document.
            causal: No token sees a later one.
            device: Device of the tensors.
            dropout: The elements to drop.
            label_positions: [N], the only positions whose last states are needed, in ascending order; None for all.
        """
        ends = np.cumsum((0, *lengths), dtype=np.int32)
        starts = np.repeat(ends[:-1], lengths)
        cu_seqlens = to_device(torch.from_numpy(ends), device)
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            causal=causal,
            dropout=dropout,
            lengths=lengths,
            documents=to_device(torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)), device),
            positions=to_device(torch.from_numpy(np.arange(ends[-1], dtype=np.int64) - starts), device),
            queries=None if label_positions is None else Queries.at(label_positions, ends, device),
        )

    @property
    def is_selected(self) -> bool:
        """Whether these are the parameters by `at_queries`."""
        return self.cu_seqlens_q is not self.cu_seqlens_kv

    def at_queries(self) -> PackedDocuments:
        """Return the parameters of an attention whose queries are `queries` alone."""
        queries = self.queries
        assert queries is not None and not self.causal, "causal kernels would align the queries with the last keys"
        changes: dict[str, Any] = {"cu_seqlens_q": queries.cu_seqlens, "max_seqlen_q": max(queries.counts)}
        return replace(self, **changes, _masks={})

    @property
    def total(self) -> int:
        """T, the tokens of the row."""
        return sum(self.lengths)

    def band(self, window: int, dtype: torch.dtype) -> tuple[int, int, Tensor]:
        """Compute the mask of a local layer, once for all layers.

        Args:
            window: Tokens that a query sees to each side.
            dtype: dtype of the scores.

        Returns:
            Keys before and after a block of BAND queries, and [blocks, 1, BAND, keys] to add to the scores: 0 where a
            query sees a key, else minus infinity.
        """
        if ("band", window, dtype) not in self._masks:
            after = 0 if self.causal else window
            blocks = -(-self.total // BAND)
            # Queries beyond T form a document of their own: they see each other, and their output is dropped.
            documents = F.pad(self.documents, (0, blocks * BAND - self.total), value=len(self.lengths))
            keys = F.pad(documents, (window, after), value=-1).unfold(0, BAND + window + after, BAND)
            offsets = torch.arange(keys.shape[1], device=keys.device) - window
            distance = torch.arange(BAND, device=keys.device)[:, None] - offsets[None, :]
            near = (distance <= window) & (distance >= -after)
            mask = (documents.view(blocks, BAND, 1) == keys[:, None, :]) & near
            added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
            self._masks["band", window, dtype] = (window, after, added[:, None])
        result: tuple[int, int, Tensor] = self._masks["band", window, dtype]
        return result

    def groups(self) -> list[DocumentGroup]:
        """Group neighbouring documents per attention call, in their order."""
        if "groups" not in self._masks:
            bounds, first, used = [], 0, 0
            for number, length in enumerate(self.lengths):
                if number > first and used + length > GROUP:
                    bounds.append((first, number))
                    first, used = number, 0
                used += length
            self._masks["groups"] = [self._group(*pair) for pair in [*bounds, (first, len(self.lengths))]]
        result: list[DocumentGroup] = self._masks["groups"]
        return result

    def _group(self, first: int, last: int) -> DocumentGroup:
        """Describe the documents first..last-1."""
        start, end = sum(self.lengths[:first]), sum(self.lengths[:last])
        keys = queries = self.documents[start:end]
        if self.is_selected:
            assert self.queries is not None
            start, end = sum(self.queries.counts[:first]), sum(self.queries.counts[:last])
            queries = self.documents[self.queries.positions[start:end]]
        mask = None
        if last - first > 1:
            same = queries[:, None] == keys[None, :]
            mask = same.tril() if self.causal else same
        return DocumentGroup(len(keys), len(queries), mask)


class ModernBertSelfAttention(SelfAttention):
    """Megatron's projections around RoPE by position in the document and attention over packed documents."""

    def __init__(self, config: Any, *args: Any, layer_number: int, **kwargs: Any) -> None:
        super().__init__(config, *args, layer_number=layer_number, **kwargs)
        self.is_local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.is_last = layer_number == config.num_layers

    def selects(self, packed: PackedDocuments) -> bool:
        """Whether this layer computes `packed.queries` alone: it is the model's last one, and global."""
        return self.is_last and not self.is_local and packed.queries is not None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedDocuments,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [T, 1, hidden] to ([T or Q, 1, hidden], bias).

        `rotary_pos_emb` is [global or local, cos or sin, T, d].
        """
        qkv, _bias = self.linear_qkv(hidden_states)
        cos, sin = rotary_pos_emb[int(self.is_local)]
        packed = packed_seq_params.at_queries() if self.selects(packed_seq_params) else packed_seq_params
        output: tuple[Tensor, Tensor | None] = self.linear_proj(self.attend(qkv, cos, sin, packed))
        return output

    def attend(self, states: Tensor, cos: Tensor, sin: Tensor, packed: PackedDocuments) -> Tensor:
        """Map qkv, [T, 1, heads * 3 * d], to what the last matrix multiplies, [T or Q, 1, heads * d]."""
        heads, dim = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        context = self.core_attention(states.view(states.shape[0], heads, 3, dim), cos, sin, packed)
        return context.reshape(context.shape[0], 1, heads * dim)
