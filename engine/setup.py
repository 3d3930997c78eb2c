"""Everything one rank needs before its first step: process groups, model, optimizer, data, log, and where to go on."""

from __future__ import annotations

import gc
import logging
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from transformers import ModernBertConfig

from configs.errors import InputError
from configs.schema import Phase, RunConfig
from datapipe.batch import MicroBatch
from datapipe.loader import Loader, evaluation_batches
from datapipe.tokenizer import Tokenizer, load_tokenizer
from engine import checkpoint as checkpoints
from engine import device
from engine.guards import Guards
from engine.megatron import ddp_timing
from engine.megatron.fp8_state import load_fp8_state
from engine.megatron.optimizer import FrozenLayers, build_optimizer
from engine.megatron.teardown import release
from engine.micro import fit_micro_batch
from engine.mirror import Mirror
from engine.modernbert.config import CONFIG_FILE, parameter_count, resolve_architecture
from engine.modernbert.convert import huggingface_weights, load_weights, random_weights
from engine.modernbert.model import ModernBert, transformer_config
from engine.objectives import CausalLM, MaskedLM, Objective
from engine.parallel import Layout, initialise, plan
from engine.precision import DTYPE, Precision, resolve_precision
from engine.saver import Saver
from engine.schedule import PhaseSchedule
from monitoring.events import CheckpointDamaged, Resumed, Started, record
from monitoring.log import Follower, read_events
from monitoring.recorder import Recorder
from monitoring.run_directory import RunDirectory

logger = logging.getLogger(__name__)
SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass
class Trainer:
    """One rank's part of a run."""

    config: RunConfig
    directory: Path
    tokenizer: Tokenizer
    architecture: ModernBertConfig
    layout: Layout
    schedule: PhaseSchedule
    model: ModernBert
    wrapped: Any
    """`model` inside Megatron's DDP (and its bf16 wrapper)."""
    parameter_waits: ddp_timing.ParameterWaits
    """Times the waits of `wrapped` for parameters of other ranks."""
    optimizer: Any
    frozen: FrozenLayers
    loader: Loader
    saver: Saver
    mirror: Mirror | None
    """On global rank 0 only, where one is configured."""
    guards: Guards
    recorder: Recorder | None
    """On global rank 0 only."""
    step: int
    """Completed steps at the start of this call."""
    data_state: dict[str, Any] | None
    """Where the streams stand: whole after loading or saving, as a phase needs to start; else this rank's share."""
    events: Follower
    """Of the run, read by global rank 0: only what is new is read again."""
    saved_at: float = field(default_factory=time.monotonic)
    evaluation: dict[Objective, list[MicroBatch]] = field(default_factory=dict)
    """This rank's share of the held-out set for each objective; empty without one."""
    micro_batch: tuple[str, int] | None = None
    """What `fit_micro_batch` gave, where it was asked."""

    @property
    def checkpoints(self) -> Path:
        return RunDirectory(self.directory).checkpoints

    def evaluation_due(self, step: int) -> bool:
        """Whether the held-out set is looked at after this many steps: at its interval and at the end of the run."""
        held_out = self.config.data.evaluation
        if held_out is None:
            return False
        interval = max(1, held_out.every.steps(self.config.tokens_per_step))
        return step % interval == 0 or step == self.schedule.total

    def replicas_due(self, step: int) -> bool:
        """Whether this step (from 1) compares the replicas: as often as checkpoints, so that those before are good."""
        every = self.config.checkpoint.every
        return step % (100 if every.unit == "minutes" else max(1, every.steps(self.config.tokens_per_step))) == 0

    def close(self) -> None:
        if self.mirror:
            self.mirror.close()
        if self.recorder:
            self.recorder.close()
        parallel_state.destroy_model_parallel()
        release(self.wrapped, self.model)  # else another trainer of this process would not get the memory


def open_trainer(config: RunConfig, directory: Path) -> Trainer:
    """Build this rank's trainer and fill it from the newest valid checkpoint, or from `model.init`."""
    tokenizer = load_tokenizer(config.tokenizer)
    architecture = resolve_architecture(config.model, tokenizer)
    precision = resolve_precision(config, parameter_count(architecture))
    layout = plan(config, architecture, dist.get_world_size())
    initialise(layout, config.seed, config.cluster.hang_timeout + 60)  # the launcher is to notice a hang first
    _log_groups()
    model, wrapped = build_model(architecture, layout, precision, config)
    optimizer = build_optimizer([wrapped], config.optimizer, DTYPE[precision])
    model.config.grad_scale_func = optimizer.scale_loss

    mirror = _mirror(config, directory)
    meta = _restore(config, directory, mirror, model, optimizer, architecture)
    step = int(meta.get("step", 0))
    recorder = None
    if dist.get_rank() == 0:
        info: dict[str, str | int | float] = {
            "device": device.name(),
            "precision": precision,
            "parameters": parameter_count(architecture),
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "data": layout.data,
            "torch": torch.__version__,
        }
        again = any(event["event"] == Started.KIND for event in read_events(directory))
        record(directory, (Resumed if again else Started)(step=step, precision=precision))
        peak = device.peak_flops(precision)
        recorder = Recorder(directory, config, info, layout.workers, peak, meta.get("recorder"), step)
    gc.collect()
    gc.freeze()  # what importing Megatron leaves behind stays, and takes 0.3 s to look through at a collection
    trainer = Trainer(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        architecture=architecture,
        layout=layout,
        schedule=PhaseSchedule(config),
        model=model,
        wrapped=wrapped,
        parameter_waits=ddp_timing.install(wrapped),
        optimizer=optimizer,
        frozen=FrozenLayers(model, optimizer),
        loader=Loader(
            config.data,
            config.batch.sequences,
            tokenizer,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            device.device().index,
        ),
        saver=Saver(RunDirectory(directory).checkpoints, config.checkpoint.keep, config.checkpoint.keep_every),
        mirror=mirror,
        guards=Guards(directory, meta.get("guards")),
        recorder=recorder,
        step=step,
        data_state=meta.get("data"),
        events=Follower(RunDirectory(directory).events),
    )
    try:
        if config.batch.micro == "auto" and device.device().type == "cuda":
            rows = layout.micro * layout.micro_batches
            key, micro = fit_micro_batch(trainer, meta.get("micro_batch"))
            trainer.micro_batch = (key, micro)
            trainer.layout = replace(layout, micro=micro, micro_batches=rows // micro)
        trainer.evaluation = _held_out(config, tokenizer, trainer.layout)
    except BaseException:
        trainer.close()
        raise
    return trainer


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
    """This rank's pipeline stage, bare and wrapped for data-parallel training."""
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
    wrapped = DistributedDataParallel(config, settings, inner)
    config.no_sync_func = wrapped.no_sync
    return model, wrapped


def _held_out(config: RunConfig, tokenizer: Tokenizer, layout: Layout) -> dict[Objective, list[MicroBatch]]:
    """The evaluation set as both objectives see it."""
    if config.data.evaluation is None:
        return {}
    rank, size = parallel_state.get_data_parallel_rank(), layout.data
    masked = Phase(objective="mlm", steps=1, mask_rate=config.data.evaluation.mask_rate)
    objectives = (CausalLM(), MaskedLM(masked, tokenizer, config.data.seed))
    return {
        objective: evaluation_batches(config.data, objective.targets(), layout.micro, tokenizer, rank, size)
        for objective in objectives
    }


def _mirror(config: RunConfig, directory: Path) -> Mirror | None:
    if config.checkpoint.mirror is None or dist.get_rank() != 0:
        return None
    return Mirror(config.checkpoint.mirror, config, directory)


def _restore(
    config: RunConfig,
    directory: Path,
    mirror: Mirror | None,
    model: ModernBert,
    optimizer: Any,
    architecture: ModernBertConfig,
) -> dict[str, Any]:
    """Load the newest valid checkpoint, here or in the mirror, and give back its meta; the initial weights and {}
    where there is none.
    """
    folder = RunDirectory(directory).checkpoints
    choice: list[Any] = [None, []]
    if dist.get_rank() == 0:
        checkpoints.clear_partial(folder)
        valid, complaints = checkpoints.latest_valid(folder)
        broken = checkpoints.list_checkpoints(folder)[: len(complaints)]
        newest = (mirror.fetch(folder, newer_than=valid) if mirror else None) or valid
        for path, complaint in zip(broken, complaints, strict=True):
            record(directory, CheckpointDamaged(reason=complaint))
            if newest and newest != path:  # else it would come before the next ones, and push them out
                checkpoints.set_aside(path)
        if complaints and newest is None:
            complaints = [*complaints, "no older checkpoint is left"]
        choice = [newest, complaints]
    dist.broadcast_object_list(choice)
    newest, damaged = choice
    if newest is None and damaged:
        raise InputError("; ".join(damaged) + f"; remove {folder} to start over")
    if newest is not None:
        meta = checkpoints.describe(newest)
        _require_same_shape(newest, meta, architecture)
        checkpoints.load(newest, model, optimizer if meta["optimizer"] else None)
        if not meta["optimizer"]:
            optimizer.reload_model_params()
        if model.config.fp8:
            load_fp8_state(newest, model)
        return meta
    init = config.model.init
    if init != "scratch" and (Path(init) / CONFIG_FILE).is_file():
        meta = checkpoints.verify(Path(init))
        _require_same_shape(Path(init), meta, architecture)
        checkpoints.load(Path(init), model, None)
    elif init != "scratch":
        load_weights(model, huggingface_weights(init, architecture, config.seed))
    else:
        load_weights(model, random_weights(architecture, config.seed))
    optimizer.reload_model_params()
    return {}


def _require_same_shape(checkpoint: Path, meta: dict[str, Any], architecture: ModernBertConfig) -> None:
    stored = meta["architecture"]
    differing = [
        f"{key} {stored[key]} -> {getattr(architecture, key)}"
        for key in SHAPE_KEYS
        if stored[key] != getattr(architecture, key)
    ]
    if differing:
        raise InputError(
            f"{checkpoint} holds a model of another size ({', '.join(differing)}); "
            "use another output directory or restore the model section"
        )
