"""Every shipped recipe is a valid run, and the paper's have the paper's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.load import RECIPES, load_config, shipped
from configs.schema import RunConfig

H100 = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-2026-11-26.json"
PAPER = {
    "modernbert-base-bio-en": [15_895, 1_589],
    "modernbert-large-bio-en": [15_895, 1_589],
    "moderncamembert-base-bio-fr": [3_179, 318],
    "freeze-low-layers": [3_179, 318],
}


@pytest.mark.parametrize("name", shipped(RECIPES))
def test_recipe_resolves_and_is_called_what_it_says(name: str) -> None:
    assert load_config(name).name == name


@pytest.mark.parametrize(("name", "steps"), PAPER.items())
def test_recipe_has_the_numbers_of_the_paper(name: str, steps: list[int]) -> None:
    config = load_config(name)
    assert [span.tokens_per_step for span in config.spans] == [3_145_728] * 2
    assert [span.steps for span in config.spans] == steps
    detour, decay = config.phases
    assert (detour.objective, decay.objective, decay.mask_rate) == ("clm", "mlm", 0.15)
    assert detour.lr.warmup.steps(3_145_728) == 32
    assert (detour.lr.shape, decay.lr.shape, decay.lr.final) == ("constant", "1-sqrt", 0.1)
    assert decay.lr.warmup.value == 0
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (2e-4, (0.9, 0.98), 1e-6)
    assert (optimizer.weight_decay, optimizer.decoupled) == (1e-5, True)
    assert (config.seed, config.data.seed) == (17, 42)
    assert sum(source.weight or 0 for source in config.data.sources) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name in shipped(RECIPES) if name.endswith("-mlm-twin")])
def test_twin_differs_in_its_first_objective_alone(name: str) -> None:
    twin, detour = load_config(name), load_config(name.removesuffix("-mlm-twin"))
    assert (twin.phases[0].objective, twin.phases[0].mask_rate) == ("mlm", 0.3)
    assert _with_clm(twin, detour) == detour


def test_freezing_control_differs_in_its_frozen_layers_alone() -> None:
    frozen, free = load_config("freeze-low-layers"), load_config("moderncamembert-base-bio-fr")
    assert frozen.phases[0].freeze == tuple(range(8))
    assert _with_clm(frozen, free) == free


def test_one_gpu_evening_is_an_evening_on_the_gpu_that_was_measured() -> None:
    config = load_config("one-gpu-evening", ["data.sources.0.text=[a.jsonl,b.jsonl]"])
    (detour, decay), spans = config.phases, config.spans
    assert (detour.objective, decay.objective, config.parallel) == ("clm", "mlm", load_config("demo").parallel)
    assert spans[1].steps == pytest.approx(0.1 * spans[0].steps, rel=0.01)
    tokens_per_second = {row["name"]: row["ours"] for row in json.loads(H100.read_text())}
    seconds = sum(
        span.steps * span.tokens_per_step / tokens_per_second[row]
        for span, row in zip(spans, ("base, CLM, bf16", "base, MLM 15 %, bf16"), strict=True)
    )
    assert 3.0 <= seconds / 3600 <= 4.0
    assert [source.text for source in config.data.sources] == [("a.jsonl", "b.jsonl")]


def _with_clm(config: RunConfig, like: RunConfig) -> RunConfig:
    """`config` under the other's name and with the other's first phase."""
    return config.model_copy(update={"name": like.name, "phases": (like.phases[0], *config.phases[1:])})
