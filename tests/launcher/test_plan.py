"""`detour plan` without GPU, Ray and hub."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import ModernBertConfig

from configs.errors import InputError
from configs.load import RECIPES, load_config, shipped
from configs.schema import RunConfig
from engine.parallel import plan
from launcher.plan import plan_run, plan_text

BILLION = ["model.hidden_size=1792", "model.intermediate_size=3840", "model.num_attention_heads=28"]
BILLION += ["model.num_hidden_layers=28", "model.init=scratch", "data.sequence_length=8184", "batch.micro=1"]
BILLION += ["tokenizer=package://tokenizer/modernbert"]
"""A model that `precision: auto` trains in FP8, in rows that FP8 does not take."""
EIGHT = ["cluster.gpus_per_node=8", "cluster.nodes=8"]


@pytest.mark.parametrize("name", sorted(set(shipped(RECIPES)) - {"demo"}))
def test_every_shipped_recipe_plans_for_64_gpus(name: str) -> None:
    planned, _ = plan_run(load_config(name, EIGHT))
    assert planned.layout.workers == 64
    assert all(phase.memory.total < 85e9 and 0.3 < phase.speed.efficiency <= 1.0 for phase in planned.phases)
    assert 0 < planned.hours < 200


def test_the_demo_is_refused_with_the_message_of_training() -> None:
    config = load_config("demo", EIGHT)
    with pytest.raises(InputError) as refusal:
        plan_run(config)
    with pytest.raises(InputError) as training:
        plan(config, ModernBertConfig(num_attention_heads=4, num_hidden_layers=4, intermediate_size=192), 16)
    assert str(refusal.value) == str(training.value)
    assert refusal.value.key == "data.streams"


def _large(*overrides: str) -> RunConfig:
    return load_config("modernbert-large-bio-en", [*EIGHT, *overrides])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["cluster.gpus_per_node=auto"], "cluster.gpus_per_node"),
        (["parallel.tensor=3"], "parallel.tensor"),
        (["parallel.tensor=2", "cluster.workers_per_node=3", "cluster.nodes=2"], "parallel.tensor"),
        (["cluster.workers_per_node=9"], "cluster.workers_per_node"),
        (["phases.0.lr.warmup=60B"], "phases.0.lr.warmup"),
        (["precision=fp8", "fp8_recipe=mxfp8"], "fp8_recipe"),
        (BILLION, "data.sequence_length"),
        (["model.hidden_size=512"], "model.hidden_size"),
        (["batch.micro=5"], "batch.micro"),
        (["cluster.nodes=1", "batch.micro=48"], "batch.micro"),
    ],
)
def test_what_training_would_refuse_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(InputError) as refusal:
        plan_run(_large(*overrides))
    assert refusal.value.key == key


def test_the_command_plans_a_pipeline_without_ray() -> None:
    """One process as a user starts it: JSON, and no import of Ray."""
    code = (
        "import sys; from launcher.cli import app; sys.argv = ['detour', 'plan', 'modernbert-large-bio-en', "
        "'parallel.tensor=4', 'parallel.pipeline=2', 'parallel.sequence=true', 'cluster.gpus_per_node=8', "
        "'--nodes', '8', '--json']; app(standalone_mode=False); assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["layout"]["data"], len(plan["stages"]), len(plan["phases"])) == (8, 2, 2)
    kinds = {"data reduce-scatter", "data all-gather", "tensor", "pipeline", "embedding"}
    assert set(plan["phases"][0]["bytes_sent"]) == kinds


def test_the_text_has_a_unit_in_every_number() -> None:
    planned, unchecked = plan_run(_large("batch.recompute=full"))
    text = plan_text(planned, unchecked)
    for word in ("15,895 steps", "50B tokens", "8,192 tokens", "384 sequences", " GB", " s", "tokens/s", " h ", "~"):
        assert word in text, word
