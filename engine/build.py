"""Builds everything one rank needs before its first step, and fills it from a checkpoint or the initial weights."""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from transformers import ModernBertConfig

from configs.schema import Phase, RunConfig
from configs.versions import software
from datapipe.batch import MicroBatch, StepData
from datapipe.loader import Loader, evaluation_batches
from datapipe.tokenizer import Tokenizer, load_tokenizer
from engine import device, micro_batch
from engine.checkpoint.manager import CheckpointManager
from engine.checkpoint_meta import CheckpointMeta, MicroBatchChoice
from engine.guards import Guards, ReplicaGuard
from engine.initial_weights import load_initial_weights
from engine.megatron import ddp_timing
from engine.megatron.optimizer import FrozenLayers, build_optimizer
from engine.megatron.teardown import release
from engine.modernbert.config import parameter_count, resolve_architecture
from engine.modernbert.model import ModernBert, transformer_config
from engine.objectives import CausalLM, MaskedLM, Objective, objective_of
from engine.parallel import Layout, initialise, plan
from engine.precision import DTYPE, Precision, resolve_precision
from engine.schedule import PhaseSchedule
from engine.step import StepRunner, to_device_batch, weight_buffers
from engine.train_state import TrainState
from monitoring.events import Resumed, Started, record
from monitoring.log import read_events
from monitoring.recorder import Recorder
from monitoring.telemetry import Telemetry

logger = logging.getLogger(__name__)

FitMicroBatch = Callable[[StepRunner, Layout, MicroBatchChoice | None], MicroBatchChoice]
"""Chooses `batch.micro: auto`, given the choice in the checkpoint; all ranks call it together."""


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
    held_out: dict[Objective, list[MicroBatch]]
    """This rank's share of the held-out set, as each objective sees it; empty without a held-out set."""
    runner: StepRunner
    checkpoints: CheckpointManager
    guards: Guards
    replicas: ReplicaGuard
    recorder: Recorder | None
    """On global rank 0 only."""
    state: TrainState

    @property
    def evaluation_due(self) -> bool:
        """Whether the held-out set is evaluated after the current step: at its interval, and at the end of the run."""
        held_out = self.config.data.evaluation
        if held_out is None:
            return False
        step = self.state.step
        return held_out.every.is_due(step, self.config.tokens_per_step) or step == self.schedule.total

    def objective(self, phase: Phase) -> Objective:
        """Return the objective of a phase."""
        return objective_of(phase, self.tokenizer, self.config.data.seed)

    def batches(
        self, objective: Objective, first: int, last: int, data: dict[str, Any] | None
    ) -> Generator[StepData, None, None]:
        """Yield this rank's batches of the 0-based steps first..last-1, on the device; `data` as in `Loader.steps`."""
        stage = partial(to_device_batch, causal=objective.causal)
        return self.loader.steps(objective.targets(), self.layout.micro_batch_size, first, last, data, stage)

    def close(self) -> None:
        """Flush logs and mirror, and free the process groups and the model."""
        self.checkpoints.close()
        if self.recorder:
            self.recorder.close()
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
    tokenizer = load_tokenizer(config.tokenizer)
    architecture = resolve_architecture(config.model, tokenizer)
    precision = resolve_precision(config, parameter_count(architecture))
    layout = plan(config, architecture, dist.get_world_size())
    initialise(layout, config.seed, config.cluster.hang_timeout + 60)  # longer, so that the launcher sees a hang first
    _log_groups()
    model, ddp_model = build_model(architecture, layout, precision, config)
    optimizer = build_optimizer([ddp_model], config.optimizer, DTYPE[precision])
    model.config.grad_scale_func = optimizer.scale_loss

    manager = CheckpointManager(config, directory, architecture, model, optimizer)
    meta = manager.restore()
    state = TrainState()
    if meta is None:
        load_initial_weights(config, architecture, model, optimizer)
    else:
        state.load_state_dict(meta)
    recorder = None
    if dist.get_rank() == 0:
        recorder = _open_recorder(config, directory, precision, layout, parameter_count(architecture), meta)
    manager.recorder = recorder
    gc.collect()
    gc.freeze()  # because a collection would look through what importing Megatron leaves behind, for 0.3 s each
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    loader = Loader(config.data, config.batch.sequences, tokenizer, rank, size, device.device().index)
    runner = StepRunner(
        model,
        ddp_model,
        optimizer,
        ddp_timing.install(ddp_model),
        config.optimizer,
        FrozenLayers(model, optimizer),
        on_launched=loader.launched,
    )
    components = Components(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        architecture=architecture,
        layout=layout,
        schedule=PhaseSchedule(config),
        loader=loader,
        held_out={},
        runner=runner,
        checkpoints=manager,
        guards=Guards(directory, meta.guards if meta else None),
        replicas=ReplicaGuard(weight_buffers(ddp_model)),
        recorder=recorder,
        state=state,
    )
    try:
        if fit is None and device.device().type == "cuda":
            fit = _fit_by_measurement(config, architecture, tokenizer)
        if config.batch.micro == "auto" and fit is not None:
            state.micro_batch = fit(runner, layout, state.micro_batch)
            rows, size = layout.micro_batch_size * layout.num_micro_batches, state.micro_batch.size
            components.layout = replace(layout, micro_batch_size=size, num_micro_batches=rows // size)
        components.held_out = _held_out(config, tokenizer, components.layout)
    except BaseException:
        components.close()
        raise
    return components


def _fit_by_measurement(config: RunConfig, architecture: ModernBertConfig, tokenizer: Tokenizer) -> FitMicroBatch:
    def fit(runner: StepRunner, layout: Layout, before: MicroBatchChoice | None) -> MicroBatchChoice:
        probe = micro_batch.GpuProbe(runner, config.data.sequence_length, tokenizer.sep_id, layout.pipeline)
        key = micro_batch.identity(config, architecture, layout, runner.model.config.fp8)
        return micro_batch.fit(probe, layout.micro_batch_size * layout.num_micro_batches, key, before)

    return fit


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
    on_gpu = device.device().type == "cuda"
    # E4M3 forward and E5M2 backward, in the layers' matrix products; the head and the embedding stay in BF16.
    fp8 = {"fp8": "hybrid", "fp8_recipe": run.fp8_recipe, "first_last_layers_bf16": run.fp8_bf16_edges}
    config = transformer_config(
        architecture,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        sequence=layout.sequence,
        dtype=DTYPE[precision],
        # Transformer Engine's products add a weight's gradient to Megatron's fp32 sum themselves.
        gradient_accumulation_fusion=on_gpu,
        **(fp8 if precision == "fp8" else {}),
    )
    model = ModernBert(config, architecture, transformer_engine=on_gpu, attention=run.attention).to(device.device())
    inner = Float16Module(config, model) if precision != "fp32" else model
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,  # behind the backward pass of the last micro-batch
        overlap_param_gather=True,  # behind the forward pass of the next step's first
    )
    ddp_model = DistributedDataParallel(config, settings, inner)
    config.no_sync_func = ddp_model.no_sync
    return model, ddp_model


def _held_out(config: RunConfig, tokenizer: Tokenizer, layout: Layout) -> dict[Objective, list[MicroBatch]]:
    """Prepare the held-out set as both objectives see it."""
    if config.data.evaluation is None:
        return {}
    rank, size = parallel_state.get_data_parallel_rank(), layout.data
    masked = Phase(objective="mlm", steps=1, mask_rate=config.data.evaluation.mask_rate)
    objectives = (CausalLM(), MaskedLM(masked, tokenizer, config.data.seed))
    return {
        objective: evaluation_batches(config.data, objective.targets(), layout.micro_batch_size, tokenizer, rank, size)
        for objective in objectives
    }
