"""The expected time of a step on H100s, from the rows that were measured on one GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import yaml
from transformers import ModernBertConfig

from configs.schema import Phase, RunConfig
from configs.spans import PhaseSpan
from engine.flops import training_flops
from engine.modernbert.config import parameter_count
from engine.parallel import Layout
from engine.planning.stages import Stage
from engine.planning.traffic import StepShape, Transfer


@functools.cache
def measured() -> dict[str, Any]:
    """Return the measured numbers and those of data sheets, `measured.yaml`."""
    content: dict[str, Any] = yaml.safe_load((resources.files("engine.planning") / "measured.yaml").read_text("utf-8"))
    return content


@dataclass(frozen=True)
class Speed:
    """The expected time of a step."""

    step_seconds: float
    tokens_per_second: float
    """Token slots of all GPUs."""
    efficiency: float
    """Share of the speed that as many single GPUs without anything to send would have."""
    bound: str
    """`GPU` or `host`: the one that the step mostly waits for."""
    extrapolated: tuple[str, ...]
    """Differences from what was measured, for people."""


def label_share(phase: Phase) -> float:
    """Return the largest share of the tokens that carry a label, over the phase's objectives."""
    rate = phase.mask_rate if isinstance(phase.mask_rate, float) else max(phase.mask_rate)
    return 1.0 if "clm" in phase.objectives else rate


def expected_speed(
    config: RunConfig,
    architecture: ModernBertConfig,
    layout: Layout,
    nodes: int,
    span: PhaseSpan,
    stages: Sequence[Stage],
    step: StepShape,
    sent: Sequence[Sequence[Transfer]],
    precision: str,
) -> Speed:
    """Estimate a phase's steps.

    The GPU's time is its FLOPs at the measured share of the peak, or the host's time to launch the layers where that is
    longer. Added are the idle share of a pipeline, what tensor and pipeline parallelism send, and what data parallelism
    sends after the backward pass has ended: the tied embedding, and what takes longer than a micro-batch.

    Args:
        config: The run's configuration.
        architecture: The model's configuration.
        layout: Sizes of the groups.
        nodes: Machines of the run.
        span: The phase.
        stages: The pipeline stages.
        step: Sizes of a step on a rank.
        sent: What a rank of each stage sends.
        precision: `fp32`, `bf16` or `fp8`.
    """
    facts, notes = measured(), _differences(config, architecture, layout, span, step, precision)
    rate = facts["peak_flops"] * _peak_share(architecture, span.phase)
    if precision == "fp8":
        rate *= _fp8_gain(config.fp8_recipe, architecture)
    if precision == "fp32":
        rate /= 2  # TF32, by the data sheet
    layer, head = _flops_per_token(architecture, span.phase)
    recompute = 4 / 3 if config.batch.recompute == "full" else 1.0
    seconds_per_flop = step.tokens / layout.tensor / rate
    by_stage = [_stage_seconds(stage, seconds_per_flop, layer * recompute, head, recompute) for stage in stages]
    micro_seconds, bound = max(by_stage, key=lambda pair: pair[0])
    network = facts["links"]["network" if nodes > 1 else "node"]

    def seconds(kind: str, link: float) -> float:
        return max(sum(transfer.bytes_sent for transfer in own if transfer.kind == kind) for own in sent) / link

    slots = step.micro_batches + layout.pipeline - 1
    in_pipeline = micro_seconds + seconds("tensor", facts["links"]["node"]) / step.micro_batches
    data = seconds("data", network)
    tied = max(stage.embedding / stage.elements for stage in stages) * data
    total = slots * in_pipeline + seconds("pipeline", network) + seconds("embedding", network)
    total += max(tied, data - micro_seconds)
    flops = step.micro_batches * step.tokens * (layer * architecture.num_hidden_layers + head)
    ideal = flops / (layout.tensor * layout.pipeline * rate)  # seconds of as many GPUs with nothing to send
    return Speed(total, span.tokens_per_step / total, ideal / total, bound, tuple(notes))


def _stage_seconds(
    stage: Stage, seconds_per_flop: float, layer: float, head: float, recompute: float
) -> tuple[float, str]:
    """Return the seconds of a micro-batch on a pipeline stage, and whether `GPU` or `host` needs them.

    Args:
        stage: The pipeline stage.
        seconds_per_flop: Seconds of the GPU, for one FLOP per token of the micro-batch.
        layer: FLOPs of a layer per token, recomputation included.
        head: FLOPs of the head per token.
        recompute: Launches of a layer, relative to a step that computes no layer again.
    """
    gpu = seconds_per_flop * (layer * stage.layers + head * stage.is_last)
    host = measured()["host_seconds_per_layer"] * stage.layers * recompute
    return (host, "host") if host > gpu else (gpu, "GPU")


def _flops_per_token(architecture: ModernBertConfig, phase: Phase) -> tuple[float, float]:
    """FLOPs of a mean layer and of the head, forward and backward, per token of the measured documents."""
    length, share = int(measured()["document_tokens"]), 0.0
    layers = 0.0
    for name, odds in phase.objectives.items():
        layers += odds * training_flops(architecture, [length], 0, name == "clm") / length
        share += odds * (1.0 if name == "clm" else label_share(phase.model_copy(update={"objective": "mlm"})))
    head = training_flops(architecture, [length], length, causal=False) - training_flops(
        architecture, [length], 0, causal=False
    )
    return layers / architecture.num_hidden_layers, share * head / length


def _shape(row: dict[str, Any]) -> ModernBertConfig:
    return ModernBertConfig(
        hidden_size=row["hidden"],
        intermediate_size=row["inner"],
        num_hidden_layers=row["layers"],
        num_attention_heads=row["heads"],
    )


@functools.cache
def _measured_shares() -> tuple[list[float], list[float], float]:
    """Parameters and shares of the peak of the CLM rows, and MLM's share of base relative to CLM's."""
    sizes, shares, masked = [], [], 0.0
    for row in measured()["rows"]:
        shape, phase = _shape(row), Phase(objective=row["objective"], steps=1)
        layer, head = _flops_per_token(shape, phase)
        share = row["tokens_per_second"] * (layer * row["layers"] + head) / measured()["peak_flops"]
        if row["objective"] == "clm":
            sizes.append(float(np.log(parameter_count(shape))))
            shares.append(share)
        else:
            masked = share / shares[0]  # the CLM row of the same size comes first
    return sizes, shares, masked


def _peak_share(architecture: ModernBertConfig, phase: Phase) -> float:
    sizes, shares, masked = _measured_shares()
    share = float(np.interp(np.log(parameter_count(architecture)), sizes, shares))
    return share * (1.0 if "clm" in phase.objectives else masked)


def _fp8_gain(recipe: str, architecture: ModernBertConfig) -> float:
    gains = measured()["fp8"].get(recipe)
    return float(np.interp(np.log(parameter_count(architecture)), _measured_shares()[0], gains)) if gains else 1.0


def _differences(
    config: RunConfig, architecture: ModernBertConfig, layout: Layout, span: PhaseSpan, step: StepShape, precision: str
) -> list[str]:
    """Say what about a phase was not measured."""
    rows = measured()["rows"]
    name = span.phase.objective_name
    shape = (architecture.hidden_size, architecture.intermediate_size, architecture.num_hidden_layers)
    alike = [row for row in rows if (row["hidden"], row["inner"], row["layers"]) == shape and row["objective"] == name]
    sequences = step.tokens // span.sequence_length
    found = {
        f"{name.upper()} of a model of this shape": not alike,
        f"sequences of {span.sequence_length:,} tokens": span.sequence_length != 8192,
        f"micro-batches of {sequences} sequences": bool(alike) and sequences != alike[0]["sequences"],
        "this size on an H100; it was an H200": bool(alike) and "gpu" in alike[0],
        f"{layout.workers} GPUs": layout.workers > 1,
        "tensor parallelism": layout.tensor > 1,
        "pipeline parallelism": layout.pipeline > 1,
        "FP32": precision == "fp32",
        "recomputation": config.batch.recompute == "full",
        f"FP8 ({config.fp8_recipe}) at this size": precision == "fp8" and not alike,
    }
    return [difference for difference, differs in found.items() if differs]
