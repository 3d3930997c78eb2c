"""The objective switch and freezing leave the rest untouched."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch

from configs.schema import RunConfig
from monitoring.log import read_metrics
from tests.engine.world import run_world, stored, toy_config, train


def train_and_watch(config: RunConfig, directory: Path) -> list[tuple[str, int, dict[str, bytes]]]:
    """Train, and keep the bytes of Adam's moments before and after every optimizer step of this rank."""
    from engine.build import build
    from engine.trainer import train_loop

    seen: list[tuple[str, int, dict[str, bytes]]] = []
    with closing(build(config, directory)) as run:
        (adam,) = (part.optimizer for part in run.runner.optimizer.chained_optimizers)

        def keep(when: str) -> None:
            states = enumerate(adam.state.values())
            moments = {f"{i}.{k}": v.numpy().tobytes() for i, state in states for k, v in state.items()}
            seen.append((when, adam.param_groups[0].get("step", 0), moments))

        adam.register_step_pre_hook(lambda *_: keep("before"))
        adam.register_step_post_hook(lambda *_: keep("after"))
        train_loop(run)
    return seen


def test_moments_cross_the_switch_untouched(shards: Path, tmp_path: Path) -> None:
    (seen,) = run_world(1, train_and_watch, toy_config(shards), tmp_path)
    after_clm = next(state for when, step, state in seen if (when, step) == ("after", 3))
    before_mlm = next(state for when, step, state in seen if (when, step) == ("before", 3))
    assert after_clm.keys() == before_mlm.keys() and after_clm
    assert after_clm == before_mlm
    assert [step for when, step, _ in seen if when == "after"] == [1, 2, 3, 4, 5], "Adam's step count never restarts"
    after_mlm = next(state for when, step, state in seen if (when, step) == ("after", 4))
    assert all(after_mlm[name] != moment for name, moment in before_mlm.items())


def test_frozen_layers_stand_still(shards: Path, tmp_path: Path) -> None:
    phases = [
        {"objective": "clm", "steps": 2},
        {"objective": "clm", "steps": 2, "freeze": [0, 2]},
        {"objective": "mlm", "steps": 1},
    ]
    run_world(2, train, toy_config(shards, phases=phases), tmp_path)
    start, frozen, thawed = (stored(tmp_path, step) for step in (2, 4, 5))
    inside = [name for name in start if "layers.0." in name or "layers.2." in name]
    assert len(inside) == 5 * 4 + 6 * 4, "five tensors in the first layer, six in the other, each with Adam's three"
    assert all(torch.equal(frozen[name], start[name]) for name in inside)
    assert not any(torch.equal(frozen[name], start[name]) for name in start if name not in inside)
    assert not any(torch.equal(thawed[name], frozen[name]) for name in inside)
    without = [{part for part, norm in line["gradient_norms"].items() if norm == 0} for line in read_metrics(tmp_path)]
    assert without == [set(), set(), {"0", "2"}, {"0", "2"}, set()]
