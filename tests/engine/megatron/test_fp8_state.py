"""Checkpoints of delayed FP8 scaling. Plain modules get Transformer Engine's state, because its own need a GPU."""

from __future__ import annotations

import zlib
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.engine.world import run_world, toy_config


def _equip(model: Any, fill: bool) -> dict[str, Any]:
    """Give every linear layer the state of Transformer Engine's layers. Return each layer's `fp8_meta` by name."""
    from engine.megatron.names import global_name

    equipped = {}
    for name, module in model.named_modules():
        if name.split(".")[-1] not in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            continue
        layer_name = global_name(model, name + ".")
        module.fp8_meta = {}

        def start(recipe: Any, meta: dict[str, Any] = module.fp8_meta) -> None:
            for direction, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
                width = meta["num_gemms"] * tensors
                meta[direction] = SimpleNamespace(scale=torch.ones(width), amax_history=torch.zeros(4, width))

        module.init_fp8_meta_tensors = start
        if fill:
            module.fp8_meta["num_gemms"] = 1
            start(None)
            for number, state in enumerate(_states(module.fp8_meta)):
                generator = torch.Generator().manual_seed(zlib.crc32(f"{layer_name}{number}".encode()))
                state.scale.uniform_(generator=generator)
                state.amax_history.uniform_(generator=generator)
        equipped[layer_name] = module.fp8_meta
    return equipped


def _states(meta: dict[str, Any]) -> list[Any]:
    return [meta["scaling_fwd"], meta["scaling_bwd"]]


def _save_and_load(
    shards: Path, scratch: Path, checkpoint: Path, save: bool, parallel: dict[str, int]
) -> dict[str, Any]:
    from engine.build import build
    from engine.checkpoint import CheckpointMeta
    from engine.checkpoint.writer import save_now
    from engine.megatron.fp8_state import load_fp8_state

    scratch.mkdir(exist_ok=True)
    with closing(build(toy_config(shards, parallel=parallel), scratch)) as run:
        equipped = _equip(run.runner.model, fill=save)
        if save:
            architecture = run.architecture.to_dict()
            meta = CheckpointMeta(step=1, architecture=architecture, optimizer=True, files={})
            save_now(checkpoint, run.runner.model, run.runner.optimizer, meta)
        else:
            load_fp8_state(checkpoint, run.runner.model)
    return {
        layer: [tensor.tolist() for state in _states(meta) for tensor in (state.scale, state.amax_history)]
        for layer, meta in equipped.items()
    }


def test_state_of_every_layout_is_restored(shards: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.parent.mkdir()
    parts = run_world(4, _save_and_load, shards, tmp_path / "a", checkpoint, True, {"tensor": 2, "pipeline": 2})
    (restored,) = run_world(1, _save_and_load, shards, tmp_path / "b", checkpoint, False, {})
    saved = {layer: tensors for part in parts for layer, tensors in part.items()}
    assert restored == saved and len(restored) == 4 * 4


def test_a_trial_step_leaves_the_state_as_it_was() -> None:
    from engine.megatron.fp8_state import preserve_fp8_state

    layer = torch.nn.Linear(1, 1)
    meta: dict[str, Any] = {}
    layer.fp8_meta = meta  # type: ignore[assignment]
    model = torch.nn.ModuleDict({"layer": layer})

    def values() -> set[tuple[float, float]]:
        return {
            (float(s), float(h)) for state in _states(meta) for s in state.scale for h in state.amax_history.view(-1)
        }

    with preserve_fp8_state(model):
        for direction in ("scaling_fwd", "scaling_bwd"):
            meta[direction] = SimpleNamespace(scale=torch.full((2,), 5.0), amax_history=torch.full((4, 2), 6.0))
    assert values() == {(1.0, 0.0)}, "as a first forward finds it"
    for state in _states(meta):
        state.scale.fill_(3.0), state.amax_history.fill_(4.0)
    with preserve_fp8_state(model):
        for state in _states(meta):
            state.scale += 1
            state.amax_history += 1
    assert values() == {(3.0, 4.0)}
