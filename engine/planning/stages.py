"""The model's division over ranks, as Megatron itself makes it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import ModernBertConfig

from configs.schema import RunConfig
from engine.parallel import Layout

TIED = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Names of the tied embedding on the first stage, and on the last one where that is another."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage. All its ranks hold equally much."""

    index: int
    layers: int
    is_first: bool
    """It has the token embedding."""
    is_last: bool
    """It has the prediction head, and a copy of the tied embedding unless it is the first stage too."""
    norm_weights: int
    """Elements of norm weights whose gradients sequence parallelism sums over tensor-parallel ranks."""
    embedding: int
    """Elements of the tied embedding on a rank; 0 between the first and the last stage."""
    buckets: tuple[int, ...]
    """Elements of each gradient bucket in the order of the backward pass, padding included."""

    @property
    def elements(self) -> int:
        """Elements of weights on a rank, padding included."""
        return sum(self.buckets)


def build_stages(config: RunConfig, architecture: ModernBertConfig, layout: Layout) -> list[Stage]:
    """Build one rank of each pipeline stage, in tensors without memory, in a world without other ranks.

    torch.distributed must not be initialised, and `engine.megatron.cpu.install` comes first.
    """
    from engine.build import data_parallel, new_model
    from engine.megatron.fake_world import fake_world, without_memory
    from engine.parallel import initialise

    stages = []
    for index in range(layout.pipeline):
        rank = index * layout.tensor * layout.data  # Megatron counts tensor, then data, then pipeline ranks
        with fake_world(layout.workers, rank):
            initialise(layout, config.seed)
            with without_memory():
                model = new_model(architecture, layout, "bf16", config)
                ddp_model = data_parallel(model)
            sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
            stages.append(
                Stage(
                    index=index,
                    layers=len(model.decoder.layers),
                    is_first=model.pre_process,
                    is_last=model.post_process,
                    norm_weights=sum(sizes[name] for name in sizes if "norm" in name and "lm_head" not in name),
                    embedding=sum(sizes.get(name, 0) for name in TIED),
                    buckets=tuple(
                        bucket.grad_data.numel() for group in ddp_model.bucket_groups for bucket in group.buckets
                    ),
                )
            )
    return stages
