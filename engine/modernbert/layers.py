"""Layer specifications: Megatron's linear layers or Transformer Engine's, with the same modules and checkpoint keys.

Norms stay separate modules. Transformer Engine's fused LayerNorm-Linear always has a norm bias, which ModernBERT lacks,
and its keys differ, so a checkpoint could not move between a CPU and a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from engine.modernbert.attention import ModernBertSelfAttention, PackedDocuments
from engine.modernbert.attention_kernels import (
    BlockedAttention,
    FlashAttention,
    FlashAttention4,
    TransformerEngineAttention,
)
from engine.modernbert.linears import PlainColumnLinear, PlainRowLinear, takes_plain_linears
from engine.modernbert.ops import add_and_norm, geglu

AttentionKernel = Literal["torch", "transformer_engine", "flash_attn_4"]
Summands = tuple[Tensor, Tensor]
"""Residual states, and what a layer adds to them, [..., h] each: a GPU adds them in the norm that comes next."""


class LayerNorm(torch.nn.Module):
    """LayerNorm with a weight and no bias, with the constructor of Megatron's specs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # With sequence parallelism each rank sees a share of the tokens, so Megatron must sum the gradient over ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, states: Tensor | Summands) -> Tensor:
        """Normalise [..., h] over its last axis."""
        states = states[0] + states[1] if isinstance(states, tuple) else states
        return F.layer_norm(states, self.weight.shape, self.weight, None, self.eps)


class SummingNorm(LayerNorm):
    """LayerNorm of a residual sum."""

    def forward(self, states: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return `states + other`, which the next residual connection carries, and the norm of the sum.

        Megatron waits for gathered weights in a hook of `__call__`, so that no other method may use the weight.
        """
        return add_and_norm(states, other, self.weight, self.eps)


class NoNorm(torch.nn.Module):
    """Stands in for the first layer's attention norm: the embedding is normalised already."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states twice."""
        return states, states


class ModernBertLayer(TransformerLayer):
    """TransformerLayer without biases, so that each norm is fused with the residual addition before it.

    The model's last layer maps T tokens to `PackedDocuments.queries` alone, if it is global and there are any.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        end = get_transformer_layer_offset(config) + get_num_layers_to_build(config)
        ends_stage = self.layer_number == end and end < config.num_layers
        # The next stage receives one tensor, and recomputation saves one.
        self.gives_summands = not ends_stage and config.recompute_granularity is None

    def forward(
        self, hidden_states: Tensor | Summands, *, rotary_pos_emb: Tensor, packed_seq_params: PackedDocuments, **_: Any
    ) -> tuple[Tensor | Summands, None]:
        """Map [T, 1, hidden] to ([T or Q, 1, hidden], None); Megatron's second value belongs to cross-attention."""
        summands = hidden_states if isinstance(hidden_states, tuple) else (hidden_states,)
        states, normed = self.input_layernorm(*summands)
        attended, _bias = self.self_attention(
            normed, attention_mask=None, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        dropout, queries = packed_seq_params.dropout, packed_seq_params.queries
        if queries is not None and self.self_attention.selects(packed_seq_params):
            states = self._own_rows(states, queries.positions)
            dropout = dropout and dropout.at(queries.positions)
        if dropout is not None:
            attended = dropout.on_attention_output(attended, self.layer_number)
        states, normed = self.pre_mlp_layernorm(states, attended)
        drop = None if dropout is None else partial(dropout.on_gated_states, layer=self.layer_number)
        output, _bias = self.mlp(normed, drop)
        return ((states, output) if self.gives_summands else states + output), None

    def _own_rows(self, states: Tensor, positions: Tensor) -> Tensor:
        """Select this rank's share of the rows: all of them, unless sequence parallelism divides them."""
        if self.config.sequence_parallel:
            states = tensor_parallel.gather_from_sequence_parallel_region(states)
            group = parallel_state.get_tensor_model_parallel_group()
            positions = positions.chunk(group.size())[group.rank()]
        return states.index_select(0, positions)


class GatedMLP(MLP):
    """Megatron's projections around ModernBERT's exact-GELU gate; Megatron's own fused gate is the tanh GELU."""

    def __init__(self, *args: Any, pg_collection: Any = None, is_mtp_layer: bool = False, **kwargs: Any) -> None:
        """Accept the two arguments that Megatron 0.19 gives any MLP; the tensor-parallel group comes from the spec."""
        super().__init__(*args, **kwargs)

    def forward(
        self, hidden_states: Tensor, drop: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map [T, 1, hidden] to ([T, 1, hidden], bias); `drop` is dropout between the matrices."""
        gated = geglu(self.linear_fc1(hidden_states)[0])
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(gated if drop is None else drop(gated))
        return output


def block_spec(
    config: TransformerConfig, *, transformer_engine: bool, attention: AttentionKernel = "torch"
) -> TransformerBlockSubmodules:
    """Describe the layers of this pipeline stage and the final norm.

    Args:
        config: Megatron's description of the model.
        transformer_engine: Use Transformer Engine's linear layers; needs a GPU.
        attention: Attention kernel of a GPU in half precision.
    """
    first = get_transformer_layer_offset(config)
    count = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(first + i == 0, config, transformer_engine, attention) for i in range(count)],
        layer_norm=LayerNorm,
    )


def _layer_spec(
    is_first: bool, config: TransformerConfig, transformer_engine: bool, attention: AttentionKernel
) -> ModuleSpec:
    column, row = _linears(config, transformer_engine)
    core: type = BlockedAttention
    if transformer_engine and config.params_dtype != torch.float32:
        core = {
            "torch": FlashAttention,
            "transformer_engine": TransformerEngineAttention,
            "flash_attn_4": FlashAttention4,
        }[attention]
    return ModuleSpec(
        module=ModernBertLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=NoNorm if is_first else SummingNorm,
            self_attention=ModuleSpec(
                module=ModernBertSelfAttention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=core,
                    linear_proj=row,
                ),
            ),
            pre_mlp_layernorm=SummingNorm,
            mlp=ModuleSpec(
                module=GatedMLP,
                params={"tp_group": parallel_state.get_tensor_model_parallel_group()},
                submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row),
            ),
        ),
    )


def _linears(config: TransformerConfig, transformer_engine: bool) -> tuple[Any, Any]:
    """Choose the layers that split a weight by columns and by rows."""
    if not transformer_engine:
        return ColumnParallelLinear, RowParallelLinear
    if takes_plain_linears(config):
        return PlainColumnLinear, PlainRowLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear
