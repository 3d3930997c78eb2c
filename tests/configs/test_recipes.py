"""Every shipped recipe is a valid run, and the paper's have the paper's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.load import RECIPES, load_config, shipped
from configs.schema import RunConfig
from configs.spans import PhaseSpan

H100 = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-2026-11-26.json"
PAPER = {
    "modernbert-base-bio-en": [15_895, 1_589],
    "modernbert-large-bio-en": [15_895, 1_589],
    "moderncamembert-base-bio-fr": [3_179, 318],
    "freeze-low-layers": [3_179, 318],
    "freeze-low-layers-decay": [3_179, 318],
    "modernbert-base-bio-en-10b": [3_179, 318],
    "moderncamembert-large-bio-fr": [3_179, 318],
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


@pytest.mark.parametrize("name", sorted(set(shipped(RECIPES)) - {"demo"}))  # which is a demonstration on one machine
def test_recipe_starts_on_any_usual_number_of_gpus(name: str) -> None:
    """Numbers 2^n and 3 x 2^n from 1 to 128."""
    config = load_config(name)
    for gpus in [2**n for n in range(8)] + [3 * 2**n for n in range(6)]:
        assert config.data.streams % gpus == 0
        assert all(span.sequences % gpus == 0 for span in config.spans)


def test_recipes_of_the_family_have_their_authors_numbers() -> None:
    """Lengths in B tokens, sequence lengths, learning rates and masks of each stage."""
    clinical, stages = load_config("bioclinical-modernbert-base"), load_config("modernbert-three-stages")
    assert [_stage(span) for span in clinical.spans] == [
        (160, 8192, ["biomedical", "clinical"], 0.3, 0.0),
        (8, 8192, ["clinical"], 0.15, 0.001),
    ]
    assert [_stage(span) for span in stages.spans] == [
        (1719, 1024, ["pretraining"], 0.3, 0.0),
        (250, 8192, ["long"], 0.3, 0.0),
        (50, 8192, ["decay"], 0.3, 0.001),
    ]
    assert [phase.lr.peak for phase in stages.phases] == [8e-4, None, None]
    assert stages.optimizer.lr == clinical.optimizer.lr == 3e-4
    assert [phase.global_rope_theta for phase in stages.phases] == [10_000, 160_000, None]
    assert {config.model.attention_output_dropout for config in (clinical, stages)} == {0.1}


def _stage(span: PhaseSpan) -> tuple[int, int, list[str], object, float]:
    billions, sources = round(span.steps * span.tokens_per_step / 1e9), [source.name for source in span.data.sources]
    return billions, span.data.sequence_length, sources, span.phase.mask_rate, span.phase.lr.final


@pytest.mark.parametrize("name", sorted(shipped(RECIPES)))
def test_the_first_line_of_a_recipe_is_a_sentence(name: str) -> None:
    """`detour recipes` and the configuration page show it alone."""
    first = shipped(RECIPES)[name].splitlines()[0]
    assert first.startswith("# ") and first.endswith(".")
