"""Rules between sections: keys that are right by themselves, and contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from configs.errors import nearest
from configs.schema.model import SCRATCH

if TYPE_CHECKING:
    from configs.schema.run import RunConfig

Fault = tuple[str, str]
"""A wrong key, and the reason with its remedy."""


def faults_between_sections(config: RunConfig) -> list[Fault]:
    """Return every contradiction between the sections of a recipe."""
    return [
        *_streams_divide_the_batch(config),
        *_sources_are_known(config),
        *_sources_are_used(config),
        *_head_was_trained(config),
        *_delayed_scaling_takes_every_layer(config),
    ]


def _streams_divide_the_batch(config: RunConfig) -> Iterator[Fault]:
    sizes = {"batch.sequences": config.batch.sequences}
    sizes |= {f"phases.{n}.batch.sequences": p.batch.sequences or 0 for n, p in enumerate(config.phases)}
    for key, sequences in sizes.items():
        if sequences % config.data.streams:
            yield (
                "data.streams",
                f"{config.data.streams} streams must divide {key} ({sequences}), "
                "because every step draws equally from each stream",
            )


def _sources_are_known(config: RunConfig) -> Iterator[Fault]:
    known = [source.name for source in config.data.sources]
    for number, phase in enumerate(config.phases):
        if phase.sources is not None and not phase.sources:
            yield f"phases.{number}.sources", "name at least one source, or leave out the key for all"
        for name in phase.sources or ():
            if name not in known:
                hint = nearest(name, known, "data.sources has")
                yield f"phases.{number}.sources.{name}", f"no such source; {hint}"


def _sources_are_used(config: RunConfig) -> Iterator[Fault]:
    for number, source in enumerate(config.data.sources):
        if not any(phase.sources is None or source.name in phase.sources for phase in config.phases):
            yield (
                f"data.sources.{number}",
                f"no phase uses the source {source.name}; name it in the `sources` of a phase, or remove it",
            )


def _head_was_trained(config: RunConfig) -> Iterator[Fault]:
    if config.model.init == SCRATCH and config.phases[0].reset:
        yield "phases.0.reset", "the head of a model from scratch is new already; remove this key"


def _delayed_scaling_takes_every_layer(config: RunConfig) -> Iterator[Fault]:
    if config.fp8_bf16_edges and config.fp8_recipe == "delayed":
        yield "fp8_bf16_edges", "Megatron has no BF16 layers with fp8_recipe: delayed; use tensorwise or false"
