"""Checks before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.load import load_config, validate
from configs.schema import RunConfig
from datapipe.loader import check_sources
from datapipe.prepare import prepare
from datapipe.tokenizer import load_tokenizer
from launcher.preflight import trained_on
from launcher.rules import require_sound_schedule
from tests.toy_recipe import TOKENIZER, toy_recipe


@pytest.mark.parametrize(
    ("overrides", "key", "code"),
    [
        (["phases.0.lr.warmup=100 steps"], "phases.0.lr.warmup", "warmup-too-long"),
        (["phases.0.lr.warmup=100M"], "phases.0.lr.warmup", "warmup-too-long"),
        (["phases.1.lr.warmup=40 steps"], "phases.1.lr.warmup", "warmup-too-long"),
        (["phases.1.steps=1", "phases.1.lr.final=0"], "phases.1.lr.shape", "rate-of-zero"),
        (["phases.0.lr.final=0.1"], "phases.0.lr.final", "final-without-decay"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(overrides: list[str], key: str, code: str) -> None:
    with pytest.raises(InputError) as refusal:
        require_sound_schedule(load_config("demo", overrides))
    assert (refusal.value.key, refusal.value.code) == (key, code)


@pytest.mark.parametrize("overrides", [[], ["phases.0.lr.warmup=99 steps"], ["phases.0.lr.warmup=0"]])
def test_a_schedule_that_reaches_its_peak_is_taken(overrides: list[Any]) -> None:
    require_sound_schedule(load_config("demo", overrides))


def test_every_shipped_recipe_has_a_sound_schedule() -> None:
    from configs.load import RECIPES, shipped

    for name in shipped(RECIPES):
        require_sound_schedule(load_config(name))


def test_an_evaluation_set_that_is_trained_on_is_told(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    for name in ("en", "fr"):
        sample = "package://corpus/tico19_" + name + ".jsonl.gz"
        prepare([sample], tokenizer, tmp_path / name)
    sources = [{"name": name, "shards": str(tmp_path / name)} for name in ("en", "fr")]
    for glob in ("fr", "fr/*.tar"):
        evaluation = {"shards": str(tmp_path / glob)}
        config = validate(RunConfig, toy_recipe(sources, {"data": {"evaluation": evaluation}}), "toy")
        (note,) = trained_on(check_sources(config.data, tokenizer, 2048))
        assert "the source fr" in note
