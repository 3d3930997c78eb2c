"""Divides the workers of a run into tensor-, pipeline- and data-parallel groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import ModernBertConfig

from configs.errors import InputError
from configs.schema import Parallel, Phase, RunConfig
from configs.spans import PhaseSpan

_AUTO_MICRO_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Most token slots of a micro-batch that `batch.micro: auto` plans for."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, and of the micro-batches."""

    tensor: int
    pipeline: int
    data: int
    sequence: bool
    micro_batch_sizes: tuple[int, ...]
    """Packed sequences of a micro-batch, by phase."""

    @property
    def workers(self) -> int:
        """Worker processes in all."""
        return self.tensor * self.pipeline * self.data


def plan(config: RunConfig, architecture: ModernBertConfig, workers: int, precision: str | None = None) -> Layout:
    """Divide `workers` processes.

    Args:
        config: The run's configuration.
        architecture: The model's configuration.
        workers: Processes, one per GPU.
        precision: What `precision: auto` stands for; default: as the recipe says, where that is not known.

    Raises:
        InputError: Keys of the configuration do not fit; the message names each of them, and what would fit.
    """
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    problems = _misfits(config, architecture)
    if workers % (tensor * pipeline):
        problems.append(
            f"cluster.workers_per_node: {workers} workers in all are not a multiple of "
            f"parallel.tensor x parallel.pipeline = {tensor * pipeline}"
        )
    _raise_misfits(problems)
    data, streams = workers // (tensor * pipeline), config.data.streams
    if streams % data:
        fitting = [size for size in range(1, streams + 1) if streams % size == 0]
        raise InputError(
            f"data.streams: {streams} streams do not divide over {data} data-parallel ranks; "
            f"use a data-parallel size among {fitting} or change data.streams",
            key="data.streams",
        )
    sizes = tuple(_micro_batch_size(config, span, data, precision or config.precision) for span in config.spans)
    return Layout(tensor, pipeline, data, config.parallel.sequence, sizes)


def require_fitting(config: RunConfig, architecture: ModernBertConfig) -> None:
    """Raise InputError if the recipe does not fit its model on any number of workers."""
    _raise_misfits(_misfits(config, architecture))


def _raise_misfits(problems: list[str]) -> None:
    if problems:
        raise InputError(
            "the configuration does not fit\n  " + "\n  ".join(problems), key=problems[0].partition(":")[0]
        )


def _misfits(config: RunConfig, architecture: ModernBertConfig) -> list[str]:
    """Return the contradictions between the recipe and its model, each as `key: reason`."""
    return [
        *_undivided(config.parallel, architecture),
        *_wrong_parts(config.phases, architecture.num_hidden_layers),
        *_too_long(config, architecture.max_position_embeddings),
    ]


def _undivided(parallel: Parallel, architecture: ModernBertConfig) -> Iterator[str]:
    tensor, pipeline = parallel.tensor, parallel.pipeline
    heads, width, layers = (
        architecture.num_attention_heads,
        architecture.intermediate_size,
        architecture.num_hidden_layers,
    )
    if heads % tensor:
        yield f"parallel.tensor: {tensor} does not divide the model's {heads} attention heads"
    if width % tensor:
        yield f"parallel.tensor: {tensor} does not divide intermediate_size {width}"
    if tensor not in (1, 2, 4, 8):
        yield f"parallel.tensor: {tensor} is not one of 1, 2, 4, 8"
    if layers % pipeline:
        yield f"parallel.pipeline: {pipeline} does not divide the model's {layers} layers"


def _wrong_parts(phases: Sequence[Phase], layers: int) -> Iterator[str]:
    for number, phase in enumerate(phases):
        frozen = {part for part in phase.freeze if isinstance(part, int)}
        if beyond := sorted(layer for layer in frozen if layer >= layers):
            yield f"phases.{number}.freeze: no layers {beyond}; the model has {layers}: 0 to {layers - 1}"
        elif len(frozen) == layers and {"embeddings", "head"} <= set(phase.freeze):
            yield f"phases.{number}.freeze: names every part of the model; leave out those that are to train"


def _too_long(config: RunConfig, positions: int) -> Iterator[str]:
    lengths = {"data.sequence_length": config.data.sequence_length}
    lengths |= {f"phases.{n}.sequence_length": p.sequence_length or 0 for n, p in enumerate(config.phases)}
    for key, length in lengths.items():
        if length > positions:
            yield (
                f"{key}: {length} is more than the model's max_position_embeddings {positions}; raise "
                "model.max_position_embeddings as well, and for a much longer context the phase's global_rope_theta"
            )


def micro_setting(config: RunConfig, span: PhaseSpan) -> tuple[str, int | Literal["auto"]]:
    """Return the key that decides the micro-batch of a phase, and its value."""
    own = span.phase.batch.micro
    return ("batch.micro", config.batch.micro) if own is None else (f"phases.{span.index}.batch.micro", own)


def _micro_batch_size(config: RunConfig, span: PhaseSpan, data: int, precision: str) -> int:
    """Packed sequences of a phase's micro-batch over `data` data-parallel ranks."""
    rows, length, tensor = span.sequences // data, span.sequence_length, config.parallel.tensor
    key, setting = micro_setting(config, span)
    micro = _auto_micro(rows, length) if setting == "auto" else setting
    where = "data" if span.phase.sequence_length is None else f"phases.{span.index}"
    if rows % micro:
        raise InputError(
            f"{key}: {micro} does not divide the {rows} sequences of a data-parallel rank "
            f"({span.sequences} sequences over {data} ranks)",
            key=key,
        )
    # A mixture of objectives cuts micro-batches of any number of rows.
    micro_rows = 1 if len(span.phase.objectives) > 1 else micro
    if micro_rows * length % tensor:
        raise InputError(
            f"{where}.sequence_length: a micro-batch of {micro_rows} x {length} tokens does not divide over {tensor} "
            "tensor-parallel ranks",
            key=f"{where}.sequence_length",
        )
    slots = micro_rows * length // (tensor if config.parallel.sequence else 1)
    multiple = 32 if config.fp8_recipe == "mxfp8" else 16  # as in megatron.core.fp8_utils.get_fp8_align_size
    if precision == "fp8" and slots % multiple:
        raise InputError(
            f"{where}.sequence_length: {config.fp8_recipe} FP8 wants micro-batches of a multiple of {multiple} tokens "
            f"on each rank, this is {slots}; choose a sequence_length that gives such a multiple",
            key=f"{where}.sequence_length",
        )
    return micro


def initialise(layout: Layout, seed: int, timeout_seconds: float = 1800.0) -> None:
    """Build Megatron's process groups over the initialised torch.distributed world.

    Args:
        layout: Sizes of the groups.
        seed: Seed of Megatron's random state.
        timeout_seconds: Time limit of the groups' collectives, rounded up to minutes.
    """
    from megatron.core import parallel_state, tensor_parallel

    from engine.megatron.logging import silence_expected_warnings

    silence_expected_warnings()
    parallel_state.initialize_model_parallel(
        layout.tensor, layout.pipeline, distributed_timeout_minutes=math.ceil(timeout_seconds / 60)
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextmanager
def single_process() -> Iterator[None]:
    """Open torch.distributed and Megatron's groups with this process alone, for Megatron code outside a run."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        initialise(Layout(1, 1, 1, False, ()), seed=0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _auto_micro(rows: int, sequence_length: int) -> int:
    limit = max(1, _AUTO_MICRO_TOKENS["cuda" if torch.cuda.is_available() else "cpu"] // sequence_length)
    return max(size for size in range(1, rows + 1) if rows % size == 0 and size <= limit)
