"""Puts together the plan of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import ModernBertConfig

from configs.schema import RunConfig
from configs.spans import PhaseSpan
from engine.checkpoint import lasting
from engine.micro_batch import MEMORY_SHARE, largest_that_fits, too_large
from engine.modernbert.config import parameter_count
from engine.parallel import Layout, micro_setting
from engine.planning.memory import WIDTH, Memory, checkpoint_bytes, step_memory
from engine.planning.speed import Speed, expected_speed, label_share, measured
from engine.planning.stages import Stage, build_stages
from engine.planning.traffic import StepShape, Transfer, transfers
from engine.schedule import PhaseSchedule


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a plan. Bytes are of the rank that has the most of them."""

    objective: str
    steps: int
    tokens: int
    """Token slots, padding included."""
    sequences: int
    """Packed sequences per global batch."""
    sequence_length: int
    first_learning_rate: float
    last_learning_rate: float
    micro: int
    """Packed sequences of a micro-batch."""
    micro_batches: int
    """Micro-batches of a step on a rank."""
    memory: Memory
    bytes_sent: dict[str, float]
    """Per step, by kind of parallelism; of data parallelism by operation."""
    speed: Speed

    @property
    def hours(self) -> float:
        """Expected duration."""
        return self.steps * self.speed.step_seconds / 3600


@dataclass(frozen=True)
class Plan:
    """A run before it starts."""

    name: str
    gpu: str
    nodes: int
    gpus_per_node: int
    layout: Layout
    precision: str
    parameters: int
    stages: tuple[Stage, ...]
    phases: tuple[PhasePlan, ...]
    checkpoint_bytes: int
    """Size of one checkpoint."""
    checkpoints_kept: int
    """At the end of the run: the newest, those at the ends of phases, and those that `checkpoint.keep_every` keeps."""

    @property
    def hours(self) -> float:
        """Expected duration of all phases, without starts, checkpoints and evaluations."""
        return sum(phase.hours for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values, sums included."""
        phases = [
            {**asdict(phase), "memory": {**asdict(phase.memory), "total": phase.memory.total}, "hours": phase.hours}
            for phase in self.phases
        ]
        return {**asdict(self), "phases": phases, "hours": self.hours}


def make_plan(
    config: RunConfig, architecture: ModernBertConfig, layout: Layout, nodes: int, per_node: int, precision: str
) -> Plan:
    """Plan a run on GPUs as they were measured.

    Args:
        config: The run's configuration.
        architecture: The model's configuration.
        layout: Sizes of the groups; the sizes of micro-batches are chosen here.
        nodes: Machines.
        per_node: Workers per machine.
        precision: `fp32`, `bf16` or `fp8`.

    Raises:
        InputError: A micro-batch is larger than the GPU.
    """
    stages, schedule = build_stages(config, architecture, layout), PhaseSchedule(config)
    phases = [
        _plan_phase(config, architecture, layout, nodes, span, stages, schedule, precision) for span in config.spans
    ]
    parameters = parameter_count(architecture)
    return Plan(
        name=config.name,
        gpu=str(measured()["gpu"]),
        nodes=nodes,
        gpus_per_node=per_node,
        layout=replace(layout, micro_batch_sizes=tuple(phase.micro for phase in phases)),
        precision=precision,
        parameters=parameters,
        stages=tuple(stages),
        phases=tuple(phases),
        checkpoint_bytes=checkpoint_bytes(parameters, WIDTH[precision]),
        # The newest is at a phase's end.
        checkpoints_kept=config.checkpoint.keep - 1 + len(lasting(range(1, config.total_steps + 1), config)),
    )


def _plan_phase(
    config: RunConfig,
    architecture: ModernBertConfig,
    layout: Layout,
    nodes: int,
    span: PhaseSpan,
    stages: Sequence[Stage],
    schedule: PhaseSchedule,
    precision: str,
) -> PhasePlan:
    rows, recompute, labels = span.sequences // layout.data, config.batch.recompute == "full", label_share(span.phase)
    width = WIDTH[precision]

    def memory(size: int) -> Memory:
        tokens, count = size * span.sequence_length, rows // size
        of_stages = (
            step_memory(architecture, layout, stage, tokens, labels, count, width=width, recompute=recompute)
            for stage in stages
        )
        return max(of_stages, key=lambda need: need.total)

    total, setting = measured()["memory_bytes"], micro_setting(config, span)[1]
    if setting == "auto":
        room = MEMORY_SHARE * total
        setting = largest_that_fits(rows, memory(1).state, lambda size: memory(size).total, room, lambda fits: fits)
    need = memory(setting)
    if need.total > total:
        state = f"{need.state / 1e9:.1f} GB are weights, gradients and optimizer"
        detail = f"phase {span.index + 1}: the formula gives {need.total / 1e9:.1f} GB, of which {state}"
        raise too_large(config, f"a GPU of {total / 1e9:.1f} GB", detail)
    tokens = setting * span.sequence_length
    step = StepShape(rows // setting, tokens, round(labels * tokens))
    sent = [transfers(architecture, layout, stage, step, weight_bytes=width, recompute=recompute) for stage in stages]
    return PhasePlan(
        objective=span.phase.objective_name,
        steps=span.steps,
        tokens=span.steps * span.tokens_per_step,
        sequences=span.sequences,
        sequence_length=span.sequence_length,
        first_learning_rate=schedule.learning_rate(span.first),
        last_learning_rate=schedule.learning_rate(span.last - 1),
        micro=setting,
        micro_batches=step.micro_batches,
        memory=need,
        bytes_sent=_most_sent(sent),
        speed=expected_speed(config, architecture, layout, nodes, span, stages, step, sent, precision),
    )


def _most_sent(sent: Sequence[Sequence[Transfer]]) -> dict[str, float]:
    """Return the bytes that a rank sends per step by kind of traffic: the most of any pipeline stage."""
    most: defaultdict[str, float] = defaultdict(float)
    for of_stage in sent:
        own: defaultdict[str, float] = defaultdict(float)
        for transfer in of_stage:
            own[f"data {transfer.operation}" if transfer.kind == "data" else transfer.kind] += transfer.bytes_sent
        most.update({kind: max(size, most[kind]) for kind, size in own.items()})
    return dict(most)
