"""ModernBERT for masked and causal language modelling on Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import ModernBertConfig

from engine.modernbert.attention import PackedDocuments
from engine.modernbert.config import padded_vocabulary
from engine.modernbert.huggingface import layer_types, rope_parameters
from engine.modernbert.layers import AttentionKernel, LayerNorm, block_spec
from engine.modernbert.linear_cross_entropy import Scratch, linear_cross_entropy

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
"""Activations of the prediction head, by Hugging Face's names."""


class PredictionHead(MegatronModule):
    """Dense layer, activation and norm, replicated on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, architecture: ModernBertConfig) -> None:
        super().__init__(config=config)
        self.activation = ACTIVATIONS[architecture.classifier_activation]  # upstream's MLM head takes the classifier's
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False, dtype=config.params_dtype)
        self.norm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        # The head sees all tokens on every rank, so its gradient needs no sum over ranks.
        self.norm.weight.sequence_parallel = False  # type: ignore[attr-defined]

    def forward(self, states: Tensor) -> Tensor:
        """Map [N, hidden] to [N, hidden]."""
        output: Tensor = self.norm(self.activation(self.dense(states)))
        return output


class OutputLayer(ColumnParallelLinear):
    """The decoder over the vocabulary. The loss is computed in its forward, where Megatron waits for its weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scratch = Scratch()

    def forward(self, states: Tensor, weight: Tensor, labels: Tensor | None, vocabulary: int) -> Tensor:
        """Compute logits, or the loss where there are labels.

        Args:
            states: [N, hidden]
            weight: [V, hidden], this rank's slice of the tied embedding.
            labels: [N] int64, or None.
            vocabulary: Entries of the whole vocabulary without padding.

        Returns:
            Logits [N, V] of this rank's slice; with labels, the result of `linear_cross_entropy`.
        """
        if labels is None:
            return F.linear(states, weight, self.bias)
        rank, size = self.tp_group.rank(), self.tp_group.size()
        part, group = (rank * weight.shape[0], vocabulary), self.tp_group if size > 1 else None
        return linear_cross_entropy(states, weight, self.bias, labels, part, group, self._scratch)


class ModernBert(LanguageModule):
    """One pipeline stage of ModernBERT with its prediction head, which serves both objectives.

    `PackedDocuments` says for each batch whether attention is causal and what dropout drops, so the model is the same
    for every objective, in training and in evaluation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: ModernBertConfig,
        *,
        transformer_engine: bool = False,
        attention: AttentionKernel = "torch",
    ) -> None:
        super().__init__(config=config)
        self.config = config
        self.architecture = architecture
        self.pre_process = parallel_state.is_pipeline_first_stage()
        self.post_process = parallel_state.is_pipeline_last_stage()
        self.share_embeddings_and_output_weights = True
        self.model_type = ModelType.encoder_or_decoder
        self._rotary_tables: dict[int, Tensor] = {}
        vocabulary = padded_vocabulary(architecture.vocab_size)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=vocabulary,
                max_sequence_length=architecture.max_position_embeddings,
                position_embedding_type="rope",
            )
            self.embedding_norm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.decoder = TransformerBlock(
            config,
            block_spec(config, transformer_engine=transformer_engine, attention=attention),
            pre_process=self.pre_process,
            post_process=self.post_process,
        )
        if self.post_process:
            self.lm_head = PredictionHead(config, architecture)
            plain = copy(config)
            plain.gradient_accumulation_fusion = False  # because Megatron's own layers need Apex for it
            self.output_layer = OutputLayer(
                config.hidden_size,
                vocabulary,
                config=plain,
                init_method=config.init_method,
                bias=True,
                skip_weight_param_allocation=self.pre_process,
            )
        self.setup_embeddings_and_output_layer()

    def set_architecture(self, architecture: ModernBertConfig) -> None:
        """Change the rotary bases; the shape stays."""
        self.architecture = architecture
        self._rotary_tables.clear()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's output; Megatron's pipeline schedule calls it."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        packed: PackedDocuments,
        label_positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            input_ids: [1, T] int64
            packed: Documents of the row.
            label_positions: [N] int64, positions that carry a label. `packed.queries`, if any, are of the same ones.
            labels: [N] int64, token ids to predict there.

        Returns:
            Hidden states [T, 1, hidden] before the last stage. On the last stage: with labels, the summed cross-entropy
            and the number of correct predictions, [2] fp32; without labels, this rank's slice of the logits over the
            padded vocabulary, [T, V].
        """
        states = None
        if self.pre_process:
            states = self.embedding_norm(self.embedding(input_ids=input_ids, position_ids=None))
            if packed.dropout is not None:
                states = packed.dropout.on_embedding(states)
        states = self.decoder(
            hidden_states=states,
            attention_mask=None,
            rotary_pos_emb=self._rotary(packed),
            packed_seq_params=packed,
        )
        if not self.post_process:
            return states
        if self.config.sequence_parallel:
            states = tensor_parallel.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
        states = states.squeeze(1)
        if label_positions is not None:
            if packed.queries is not None and self.decoder.layers[-1].self_attention.selects(packed):
                label_positions = packed.queries.label_rows
            states = states.index_select(0, label_positions)  # its backward is cheaper than advanced indexing's
        output: Tensor = self.output_layer(
            self.lm_head(states), self.shared_embedding_or_output_weight(), labels, self.architecture.vocab_size
        )
        return output

    def _rotary(self, packed: PackedDocuments) -> Tensor:
        """Return [global or local, cos or sin, T, d] in the computing dtype, by position in the document."""
        length = (
            1 << (packed.max_seqlen_q - 1).bit_length()
        )  # a power of two, so that a few tables serve all micro-batches
        if length not in self._rotary_tables:
            self._rotary_tables[length] = self._rotary_table(length, packed.cu_seqlens_q.device)
        return self._rotary_tables[length][:, :, packed.positions]

    def _rotary_table(self, length: int, device: torch.device) -> Tensor:
        dim = self.config.kv_channels
        kinds = ("full_attention", "sliding_attention")
        theta = [float(rope_parameters(self.architecture)[kind]["rope_theta"]) for kind in kinds]
        powers = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        inverse = torch.stack([1.0 / base**powers for base in theta])
        angles = torch.arange(length, dtype=torch.float32)[None, :, None] * inverse[:, None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return torch.stack((angles.cos(), angles.sin()), dim=1).to(device=device, dtype=self.config.params_dtype)


def transformer_config(
    architecture: ModernBertConfig,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    sequence: bool = False,
    dtype: torch.dtype = torch.float32,
    **extra: Any,
) -> TransformerConfig:
    """Translate a ModernBERT's configuration for Megatron.

    Args:
        architecture: The model's configuration.
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        sequence: Sequence parallelism.
        dtype: dtype of weights and activations.
        **extra: Further fields of Megatron's TransformerConfig, such as those of FP8.
    """
    half = architecture.local_attention // 2
    return TransformerConfig(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        ffn_hidden_size=architecture.intermediate_size,
        gated_linear_unit=True,
        activation_func=F.gelu,
        bias_activation_fusion=False,  # Megatron's fused GEGLU is the tanh GELU; ModernBERT's is the exact one
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        add_bias_linear=False,
        normalization="LayerNorm",
        layernorm_epsilon=architecture.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        window_size=(half, half),
        # The list form, 1 = local: the integer form counts from 1 and misplaces the global layers.
        window_attn_skip_freq=[int(kind == "sliding_attention") for kind in layer_types(architecture)],
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # `engine.modernbert.convert` fills in the weights, so that every layout starts from the same ones. Megatron's
        # initialisation must still run: it marks the weights that tensor parallelism splits, for the gradient norm.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        use_cpu_initialization=not torch.cuda.is_available(),
        hetereogenous_dist_checkpoint=True,  # Megatron's spelling; keys go by layer, since the first has no norm
        calculate_per_token_loss=True,
        **extra,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight
