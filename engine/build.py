"""Builds everything one rank needs before its first step, and fills it from a checkpoint or the initial weights."""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from transformers import ModernBertConfig

from configs.schema import Phase, RunConfig
from configs.spans import PhaseSpan
from configs.versions import software
from datapipe.batch import MicroBatch, StepData
from datapipe.loader import Loader, evaluation_batches
from datapipe.prefetch import LaunchGate
from datapipe.tokenizer import Tokenizer
from engine import device, micro_batch
from engine.checkpoint.manager import CheckpointManager
from engine.checkpoint_meta import CheckpointMeta
from engine.dealing import RowExchange, row_cost
from engine.guards import Guards, ReplicaGuard
from engine.initial_weights import load_initial_weights, reset_head
from engine.megatron import ddp_timing
from engine.megatron.optimizer import FrozenWeights, build_optimizer
from engine.megatron.teardown import release
from engine.modernbert.config import parameter_count, phase_architecture, resolve_dropout
from engine.modernbert.model import ModernBert, transformer_config
from engine.objectives import CausalLM, MaskedLM, Objective, objective_of
from engine.parallel import Layout, initialise, micro_setting, plan
from engine.precision import DTYPE, Precision, resolve_precision
from engine.run_inputs import run_architecture, run_tokenizer
from engine.schedule import PhaseSchedule
from engine.step import StepRunner, to_device_batch, weight_buffers
from engine.train_state import TrainState
from monitoring.events import Resumed, Started, record
from monitoring.log import read_events
from monitoring.recorder import Recorder
from monitoring.telemetry import Telemetry

logger = logging.getLogger(__name__)

BUCKET_PARAMETERS = 10_000_000
"""Least parameters of a gradient bucket. Megatron's default grows with the data-parallel size, to the whole model."""

FitMicroBatch = Callable[[StepRunner, Layout, PhaseSpan, dict[str, int]], int]
"""Chooses a phase's `batch.micro: auto`, by the choices in the checkpoint, to which it adds; all ranks call it."""


@dataclass
class Components:
    """One rank's parts of a run, ready for the next step."""

    config: RunConfig
    directory: Path
    tokenizer: Tokenizer
    architecture: ModernBertConfig
    layout: Layout
    schedule: PhaseSchedule
    loader: Loader
    """Makes the batches of the current phase."""
    held_out: dict[Objective, list[MicroBatch]]
    """This rank's share of the held-out set, as each objective sees it; empty without a held-out set."""
    runner: StepRunner
    checkpoints: CheckpointManager
    guards: Guards
    replicas: ReplicaGuard
    recorder: Recorder | None
    """On global rank 0 only."""
    state: TrainState
    hosts: dist.ProcessGroup
    """All ranks, by gloo: their hosts exchange numbers while GPUs work."""
    row_exchange: RowExchange | None
    """None without data parallelism."""

    def evaluation_due(self, span: PhaseSpan) -> bool:
        """Return whether the current step is followed by an evaluation: at its interval, and at the end of the run."""
        held_out, step = self.config.data.evaluation, self.state.step
        return held_out is not None and (span.is_due(held_out.every, step) or step == self.schedule.total)

    def begin_phase(self, span: PhaseSpan) -> Objective:
        """Make model, optimizer and data those of a phase, at its first step or after a resume within it."""
        self.state.phase = span.index
        self.runner.frozen.freeze(span.phase.freeze)
        self.runner.model.set_architecture(phase_architecture(self.architecture, self.config, span.index))
        self.loader = _loader(self.config, span, self.tokenizer, self.loader.gate)
        if span.phase.reset and self.state.step == span.first:
            reset_head(self.runner.model, self.runner.optimizer, self.config.seed, span.index)
        return objective_of(span, self.tokenizer, self.config.data.seed)

    def batches(
        self, span: PhaseSpan, objective: Objective, first: int, last: int, data: dict[str, Any] | None
    ) -> Generator[StepData, None, None]:
        """Yield this rank's batches of a phase's 0-based steps first..last-1, on the device.

        `begin_phase` comes first. `data` is as in `Loader.steps`.
        """
        targets, micro = objective.targets(), self.layout.micro_batch_sizes[span.index]
        exchange = None
        if self.row_exchange:
            cost = row_cost(self.architecture, targets)
            exchange = partial(self.row_exchange, cost=cost, micro_batch_size=micro)
        return self.loader.steps(
            targets,
            micro,
            first,
            last,
            data,
            partial(to_device_batch, dropout=resolve_dropout(self.config, self.architecture)),
            exchange,
            begins_phase=first == span.first,
        )

    def close(self) -> None:
        """Flush logs and mirror, and free the process groups and the model."""
        self.checkpoints.close()
        if self.recorder:
            self.recorder.close()
        if self.row_exchange:
            self.row_exchange.close()
        parallel_state.destroy_model_parallel()
        release(self.runner.ddp_model, self.runner.model)  # else another run of this process would not get the memory


def build(config: RunConfig, directory: Path, fit: FitMicroBatch | None = None) -> Components:
    """Build this rank's components and fill them from the newest valid checkpoint, or from `model.init`.

    All ranks call it together, with torch.distributed initialised.

    Args:
        config: The resolved configuration.
        directory: The run directory.
        fit: Chooses `batch.micro: auto`. Default: by measurement on a GPU, and not at all on a CPU.

    Raises:
        InputError: Checkpoints, weights or data do not fit the configuration.
    """
    if config.deterministic and device.device().type == "cuda":
        device.use_deterministic_algorithms()
    tokenizer = run_tokenizer(config, directory)
    architecture = run_architecture(config, directory, tokenizer)
    precision = resolve_precision(config, parameter_count(architecture))
    layout = plan(config, architecture, dist.get_world_size(), precision)
    patience = timedelta(seconds=config.cluster.hang_timeout + 60)  # longer, so that the launcher sees a hang first
    initialise(layout, config.seed, patience.total_seconds())
    _log_groups()
    model, ddp_model = build_model(architecture, layout, precision, config)
    optimizer = build_optimizer([ddp_model], config.optimizer, DTYPE[precision])
    model.config.grad_scale_func = optimizer.scale_loss

    manager = CheckpointManager(config, directory, architecture, model, optimizer)
    meta = manager.restore()
    state = TrainState()
    if meta is None:
        load_initial_weights(config, architecture, tokenizer, model, optimizer)
    else:
        state.load_state_dict(meta)
    recorder = None
    if dist.get_rank() == 0:
        recorder = _open_recorder(config, directory, precision, layout, parameter_count(architecture), meta)
    manager.recorder = recorder
    gc.collect()
    gc.freeze()  # because a collection would look through what importing Megatron leaves behind, for 0.3 s each
    schedule = PhaseSchedule(config)
    loader = _loader(config, schedule.spans[0], tokenizer, LaunchGate())
    runner = StepRunner(
        model,
        ddp_model,
        optimizer,
        ddp_timing.install(ddp_model),
        config.optimizer,
        FrozenWeights(model, optimizer),
        on_launched=loader.gate.open,
    )
    components = Components(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        architecture=architecture,
        layout=layout,
        schedule=schedule,
        loader=loader,
        held_out={},
        runner=runner,
        checkpoints=manager,
        guards=Guards(directory, meta.guards if meta else None),
        replicas=ReplicaGuard(weight_buffers(ddp_model)),
        recorder=recorder,
        state=state,
        hosts=dist.new_group(backend="gloo", timeout=patience),
        row_exchange=RowExchange(parallel_state.get_data_parallel_group(), patience) if layout.data > 1 else None,
    )
    try:
        if fit is None and device.device().type == "cuda":
            fit = _fit_by_measurement(config, architecture, tokenizer)
        if fit is not None:
            components.layout = _fitted_layout(components, fit)
        components.held_out = _held_out(config, tokenizer, components.layout)
    except BaseException:
        components.close()
        raise
    return components


def _fitted_layout(run: Components, fit: FitMicroBatch) -> Layout:
    """Return the layout with a fitted micro-batch in each remaining phase that asks for `auto`."""
    sizes = list(run.layout.micro_batch_sizes)
    for span in run.schedule.remaining(run.state.step):
        if micro_setting(run.config, span)[1] == "auto":
            sizes[span.index] = fit(run.runner, run.layout, span, run.state.micro_batches)
    return replace(run.layout, micro_batch_sizes=tuple(sizes))


def _fit_by_measurement(config: RunConfig, architecture: ModernBertConfig, tokenizer: Tokenizer) -> FitMicroBatch:
    def fit(runner: StepRunner, layout: Layout, span: PhaseSpan, choices: dict[str, int]) -> int:
        dropout = resolve_dropout(config, architecture)
        probe = micro_batch.GpuProbe(runner, span.sequence_length, tokenizer.sep_id, layout.pipeline, dropout)
        key = micro_batch.identity(config, span, architecture, layout, runner.model.config.fp8)
        choices[key] = micro_batch.fit(probe, span.sequences // layout.data, key, choices.get(key))
        return choices[key]

    return fit


def _loader(config: RunConfig, span: PhaseSpan, tokenizer: Tokenizer, gate: LaunchGate) -> Loader:
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return Loader(span.data, span.sequences, tokenizer, rank, size, device.device().index, gate)


def _open_recorder(
    config: RunConfig,
    directory: Path,
    precision: Precision,
    layout: Layout,
    parameters: int,
    meta: CheckpointMeta | None,
) -> Recorder:
    info: dict[str, str | int | float] = {
        "device": device.name(),
        "precision": precision,
        "parameters": parameters,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "data": layout.data,
        **software(),
    }
    step, recorded = (meta.step, meta.recorder) if meta else (0, None)
    again = any(event["event"] == Started.KIND for event in read_events(directory))
    before = Telemetry.read(directory)
    lost = max(0, before.step - step) if before else 0
    event = (
        Resumed(step=step, precision=precision, steps_lost=lost) if again else Started(step=step, precision=precision)
    )
    record(directory, event)
    return Recorder(directory, config, info, layout.workers, device.peak_flops(precision), recorded, step)


def _log_groups() -> None:
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
    }
    ranks = ", ".join(f"{name} {dist.get_process_group_ranks(group)}" for name, group in groups.items())
    logger.info(
        "rank %d of %d on %s; its groups: %s", dist.get_rank(), dist.get_world_size(), socket.gethostname(), ranks
    )


def build_model(
    architecture: ModernBertConfig, layout: Layout, precision: Precision, run: RunConfig
) -> tuple[ModernBert, Any]:
    """Build this rank's pipeline stage, bare and inside Megatron's data-parallel wrappers."""
    model = new_model(architecture, layout, precision, run).to(device.device())
    return model, data_parallel(Float16Module(model.config, model) if precision != "fp32" else model)


def new_model(architecture: ModernBertConfig, layout: Layout, precision: Precision, run: RunConfig) -> ModernBert:
    """Build this rank's pipeline stage, in the precision's dtype."""
    on_gpu = device.device().type == "cuda"
    # E4M3 forward and E5M2 backward, in the layers' matrix products; the head and the embedding stay in BF16.
    fp8 = {"fp8": "hybrid", "fp8_recipe": run.fp8_recipe, "first_last_layers_bf16": run.fp8_bf16_edges}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = transformer_config(
        architecture,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        sequence=layout.sequence,
        dtype=DTYPE[precision],
        # Transformer Engine's products add a weight's gradient to Megatron's fp32 sum themselves.
        gradient_accumulation_fusion=on_gpu,
        **(fp8 if precision == "fp8" else {}),
        **(recompute if run.batch.recompute == "full" else {}),
    )
    replaced = run.deterministic and run.attention == "transformer_engine"
    attention = "torch" if replaced else run.attention
    model = ModernBert(config, architecture, transformer_engine=on_gpu, attention=attention)
    if model.pre_process:
        # Megatron's mark for a bucket of its own. The tied embedding's gradient is complete last, so others would wait.
        model.embedding.word_embeddings.weight.shared_embedding = True
    return model


def data_parallel(model: Any) -> Any:
    """Wrap a model for Megatron's distributed optimizer, with gradient buckets that overlap with the passes."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,  # behind the backward pass of the last micro-batch
        overlap_param_gather=True,  # behind the forward pass of the next step's first
        bucket_size=BUCKET_PARAMETERS,
    )
    ddp_model = DistributedDataParallel(model.config, settings, model)
    model.config.no_sync_func = ddp_model.no_sync
    return ddp_model


def _held_out(config: RunConfig, tokenizer: Tokenizer, layout: Layout) -> dict[Objective, list[MicroBatch]]:
    """Prepare the held-out set as both objectives see it, in rows of `data.sequence_length` in every phase."""
    if config.data.evaluation is None:
        return {}
    slots = min(size * span.sequence_length for size, span in zip(layout.micro_batch_sizes, config.spans, strict=True))
    micro = max(1, slots // config.data.sequence_length)
    rank, size = parallel_state.get_data_parallel_rank(), layout.data
    masked = Phase(objective="mlm", steps=1, mask_rate=config.data.evaluation.mask_rate)
    objectives: tuple[CausalLM | MaskedLM, ...] = (CausalLM(), MaskedLM(masked, tokenizer, config.data.seed))
    return {
        objective: evaluation_batches(config.data, objective.targets(), micro, tokenizer, rank, size)
        for objective in objectives
    }
