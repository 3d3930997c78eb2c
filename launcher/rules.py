"""Rules of a run that need no cluster: its schedule, its workers per node, and enough data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.errors import InputError
from configs.schema import RunConfig
from configs.units import format_count

if TYPE_CHECKING:
    from datapipe.source import SourceSummary


def require_sound_schedule(config: RunConfig) -> None:
    """Raise InputError for a learning-rate schedule that contradicts itself."""
    for span in config.spans:
        number, phase, steps = span.index, span.phase, span.steps
        warmup = phase.lr.warmup.steps(span.tokens_per_step)
        if warmup >= steps:
            raise InputError(
                f"phases.{number}.lr.warmup: {warmup:,} steps of warmup do not fit into its {steps:,} steps: the "
                f"rate would never reach its peak; shorten the warmup ({phase.lr.warmup}) or lengthen the phase",
                key=f"phases.{number}.lr.warmup",
                code="warmup-too-long",
            )
        if steps == 1 and phase.lr.shape != "constant" and not phase.lr.final:
            raise InputError(
                f"phases.{number}.lr.shape: the only step of the phase is its last, whose rate is 0, so nothing is "
                "learned; lengthen the phase, or set lr.final or lr.shape: constant",
                key=f"phases.{number}.lr.shape",
                code="rate-of-zero",
            )
        if phase.lr.shape == "constant" and phase.lr.final:
            raise InputError(
                f"phases.{number}.lr.final: a constant shape does not fall to {phase.lr.final}; set lr.shape to "
                "1-sqrt, linear or cosine, or remove final",
                key=f"phases.{number}.lr.final",
                code="final-without-decay",
            )


def workers_per_node(config: RunConfig, gpus: int) -> int:
    """Return the workers on a node with `gpus` GPUs."""
    if config.cluster.workers_per_node == "auto":
        return gpus or config.parallel.tensor * config.parallel.pipeline
    return config.cluster.workers_per_node


def require_gpus(per_node: int, gpus: int) -> None:
    """Raise InputError if a node with GPUs has fewer of them than workers."""
    if 0 < gpus < per_node:
        raise InputError(
            f"cluster.workers_per_node: {per_node} workers, but a node has {gpus} GPUs", key="cluster.workers_per_node"
        )


def require_enough(config: RunConfig, sources: Sequence[SourceSummary]) -> None:
    """Raise InputError if all sources reach their last epoch, surely before the last step."""
    limits = [source.epochs for source in config.data.sources]
    summaries = sources[: len(limits)]  # without the evaluation set
    if None in limits or not all(source.tokens for source in summaries):  # raw text is not counted before it is read
        return
    tokens = sum(source.framed_tokens * (epochs or 0) for source, epochs in zip(summaries, limits, strict=True))
    slots = config.spans[-1].tokens(config.total_steps)
    if 2 * tokens < slots:  # packed rows are at least half full
        raise InputError(
            f"data.sources: all reach their `epochs` after {format_count(tokens)} tokens, and the phases need at "
            f"least {format_count(slots / 2)}; shorten the phases, or let a source repeat",
            key="data.sources",
            code="sources-too-short",
        )
