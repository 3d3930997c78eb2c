"""Checks before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from configs.errors import InputError
from configs.load import load_config
from launcher.rules import require_sound_schedule


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
