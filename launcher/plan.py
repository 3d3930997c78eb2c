"""`detour plan`: checks a recipe for a cluster that is not here, and says what the run will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from configs.errors import InputError
from configs.schema import SCRATCH, RunConfig
from configs.units import format_count
from launcher.rules import require_enough, require_gpus, require_sound_schedule, workers_per_node
from launcher.topology import check_tensor_groups
from monitoring.formatting import format_seconds

if TYPE_CHECKING:
    from transformers import ModernBertConfig

    from datapipe.tokenizer import Tokenizer
    from engine.parallel import Layout
    from engine.planning.plan import PhasePlan, Plan

KINDS = {
    "data reduce-scatter": "data parallel, gradients",
    "data all-gather": "data parallel, weights",
    "tensor": "tensor parallel",
    "pipeline": "pipeline parallel",
    "embedding": "pipeline's tied embedding",
}
"""Kinds of traffic, for people."""


def plan_run(config: RunConfig) -> tuple[Plan, list[str]]:
    """Check a run as its start would, without its cluster, and plan it.

    Returns:
        The plan, and what was not checked because it is not here.

    Raises:
        InputError: The run would be refused, by the same message, or it does not fit the GPU.
    """
    from engine.megatron import cpu

    cpu.install()
    from engine.modernbert.config import parameter_count
    from engine.planning.plan import make_plan
    from engine.precision import HOPPER, resolve_precision

    require_sound_schedule(config)
    architecture, tokenizer = _model_of(config)
    gpus = _gpus_per_node(config)
    precision = resolve_precision(config, parameter_count(architecture), HOPPER)
    nodes, per_node, layout = _largest_layout(config, architecture, gpus, precision)
    unchecked = _check_data(config, architecture, tokenizer)
    return make_plan(config, architecture, layout, nodes, per_node, precision), unchecked


def _model_of(config: RunConfig) -> tuple[ModernBertConfig, Tokenizer | None]:
    """Return the model's configuration, and the tokenizer; None if it is the one of a model that is not here."""
    from datapipe.tokenizer import load_tokenizer
    from engine.initial_weights import check_initial_weights
    from engine.modernbert.config import resolve_architecture

    init = config.model.init
    table = resources.files("engine.planning") / "known_models.yaml"
    known: dict[str, dict[str, Any]] = yaml.safe_load(table.read_text("utf-8"))

    def shape(reference: str) -> dict[str, Any] | None:
        return None if Path(reference).expanduser().exists() else known.get(reference.partition("@")[0])

    published, of_tokenizer = shape(init), shape(config.tokenizer)
    is_known = of_tokenizer is not None and init in (SCRATCH, config.tokenizer)
    tokenizer = None if is_known else load_tokenizer(config.tokenizer)
    if is_known and init == SCRATCH:
        published = {key: value for key, value in (of_tokenizer or {}).items() if key == "vocab_size"}
    architecture = resolve_architecture(config.model, tokenizer, published)
    if init != SCRATCH and published is None and tokenizer is not None:
        check_initial_weights(init, architecture, tokenizer)
    return architecture, tokenizer


def _gpus_per_node(config: RunConfig) -> int:
    """Return the GPUs of a node that is not here."""
    gpus = config.cluster.gpus_per_node
    if isinstance(gpus, int) and gpus > 0:
        return gpus
    raise InputError(
        f"cluster.gpus_per_node: a plan is for nodes with GPUs that are not here, and cannot ask them ({gpus}); give "
        "their number, such as cluster.gpus_per_node=8",
        key="cluster.gpus_per_node",
        code="gpus-unknown",
    )


def _largest_layout(
    config: RunConfig, architecture: ModernBertConfig, gpus: int, precision: str
) -> tuple[int, int, Layout]:
    """Return nodes, workers per node and layout of the most nodes that the run can be divided over."""
    from engine.parallel import plan

    per_node = workers_per_node(config, gpus)
    require_gpus(per_node, gpus)
    nodes = config.cluster.nodes
    fewest, most = (nodes, nodes) if isinstance(nodes, int) else nodes
    problem: InputError | None = None
    for number in range(most, fewest - 1, -1):
        try:
            layout = plan(config, architecture, number * per_node, precision)
            check_tensor_groups([f"{rank // per_node}" for rank in range(number * per_node)], layout.tensor)
        except InputError as error:
            problem = error
            continue
        return number, per_node, layout
    assert problem is not None
    raise problem


def _check_data(config: RunConfig, architecture: ModernBertConfig, tokenizer: Tokenizer | None) -> list[str]:
    """Check shards that are here, and return what is not."""
    from datapipe.loader import check_sources
    from datapipe.words import word_starts

    evaluation = config.data.evaluation
    sources = [*config.data.sources, *([evaluation.source] if evaluation else [])]
    absent = [source.name for source in sources if "://" in source.shards or not Path(source.shards).is_dir()]
    if tokenizer is None:
        models = sorted({config.tokenizer, config.model.init} - {SCRATCH})
        return [f"files of {', '.join(models)}", f"shards of {', '.join(source.name for source in sources)}"]
    if any(phase.mask_unit == "word" for phase in config.phases):
        word_starts(tokenizer)
    if absent:
        return [f"shards of {', '.join(absent)}"]
    require_enough(config, check_sources(config.data, tokenizer, architecture.vocab_size))
    return []


def plan_text(plan: Plan, unchecked: list[str]) -> str:
    """Describe a plan for people: a column per phase, a unit in every number, `~` before what is extrapolated."""
    return "\n".join([*_heading(plan), "", *_aligned(_table(plan.phases)), "", *_closing(plan, unchecked)])


def _heading(plan: Plan) -> list[str]:
    layout = plan.layout
    sharing = ", sequence parallel" if layout.sequence else ""
    return [
        f"{plan.name}: {plan.nodes} node{'s' * (plan.nodes > 1)} with {plan.gpus_per_node} GPU"
        f"{'s' * (plan.gpus_per_node > 1)} each ({plan.gpu}); no GPU was asked",
        f"  model   {format_count(plan.parameters)} parameters, {plan.precision}",
        f"  layout  data {layout.data} x tensor {layout.tensor} x pipeline {layout.pipeline}{sharing}",
    ]


def _table(phases: Sequence[PhasePlan]) -> list[tuple[str, list[str]]]:
    """Return the rows of a plan: a name, and a cell per phase. A row without cells is a heading."""
    speeds = [phase.speed for phase in phases]
    guess = ["~" * bool(speed.extrapolated) for speed in speeds]
    kinds = [kind for kind in KINDS if any(kind in phase.bytes_sent for phase in phases)]
    return [
        ("", [f"phase {number}" for number in range(1, len(phases) + 1)]),
        ("objective", [phase.objective for phase in phases]),
        ("steps", [f"{phase.steps:,} steps" for phase in phases]),
        ("tokens, padding included", [f"{format_count(phase.tokens)} tokens" for phase in phases]),
        ("sequence length", [f"{phase.sequence_length:,} tokens" for phase in phases]),
        ("global batch", [f"{phase.sequences:,} sequences" for phase in phases]),
        ("micro-batch on a rank", [_micro(phase) for phase in phases]),
        ("learning rate", [f"{p.first_learning_rate:.3g} -> {p.last_learning_rate:.3g}" for p in phases]),
        ("", []),
        ("memory of the fullest GPU, by formula, not measured", []),
        *_memory_rows(phases),
        ("", []),
        ("sent by a GPU per step, by formula", []),
        *((f"  {KINDS[kind]}", [_size(phase.bytes_sent.get(kind, 0.0)) for phase in phases]) for kind in kinds),
        ("", []),
        ("expected", []),
        ("  step", [f"{mark}{speed.step_seconds:.3f} s" for mark, speed in zip(guess, speeds, strict=True)]),
        (
            "  speed",
            [f"{mark}{format_count(s.tokens_per_second)} tokens/s" for mark, s in zip(guess, speeds, strict=True)],
        ),
        ("  efficiency", [f"{mark}{speed.efficiency:.0%}" for mark, speed in zip(guess, speeds, strict=True)]),
        ("  waits mostly for the", [speed.bound for speed in speeds]),
        (
            "  duration",
            [f"{mark}{format_seconds(3600 * phase.hours)}" for mark, phase in zip(guess, phases, strict=True)],
        ),
    ]


def _closing(plan: Plan, unchecked: list[str]) -> list[str]:
    """Return the lines below the table: the whole run, and what its numbers do not know."""
    extrapolated = sorted({note for phase in plan.phases for note in phase.speed.extrapolated})
    kept = plan.checkpoints_kept
    lines = [
        f"duration     {'~' * bool(extrapolated)}{format_seconds(3600 * plan.hours)}, "
        "without starts, checkpoints and evaluations",
        f"checkpoints  {_size(plan.checkpoint_bytes)} each; {kept} are kept: {_size(kept * plan.checkpoint_bytes)}",
    ]
    if extrapolated:
        lines.append(f"~            extrapolated from one GPU's measured rows; not measured: {'; '.join(extrapolated)}")
    if plan.layout.workers > 1:
        lines.append("not counted  ranks that wait for one with costlier rows (a few percent), and slow links")
    if unchecked:
        lines.append(f"not checked  because it is not here: {'; '.join(unchecked)}")
    return lines


def _memory_rows(phases: Sequence[PhasePlan]) -> list[tuple[str, list[str]]]:
    parts: dict[str, Callable[[PhasePlan], float]] = {
        "weights": lambda phase: phase.memory.weights,
        "gradients": lambda phase: phase.memory.gradients,
        "optimizer": lambda phase: phase.memory.optimizer,
        "activations": lambda phase: phase.memory.activations,
        "head": lambda phase: phase.memory.head,
        "the layer being computed": lambda phase: phase.memory.temporary,
        "sum": lambda phase: phase.memory.total,
    }
    return [(f"  {name}", [_size(part(phase)) for phase in phases]) for name, part in parts.items()]


def _micro(phase: PhasePlan) -> str:
    return f"{phase.micro_batches} x {phase.micro} sequence{'s' * (phase.micro > 1)}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _aligned(rows: list[tuple[str, list[str]]]) -> list[str]:
    """Align the cells of each column to the right."""
    first = max(len(name) for name, cells in rows if cells)
    width = max(len(cell) for _, cells in rows for cell in cells)
    return [
        (f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell in cells)).rstrip() if cells else name
        for name, cells in rows
    ]
