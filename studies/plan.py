"""What a study is: a recipe, a grid over its keys, and arms that are compared at every point of the grid."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from configs.errors import InputError
from configs.load import differences, load_config, read_mapping, read_yaml, validate
from configs.schema import RunConfig, Section
from configs.units import parse_count

SHIPPED = resources.files("studies") / "shipped"
SHARED = ("data.", "tokenizer", "batch.sequences")
"""Keys that decide the order of the data: the same in all arms."""
DERIVED = ("parameters", "decay_share", "frozen_share")


class Evaluated(Section):
    """A task every trained model is fine-tuned on."""

    task: str
    """A task YAML or the name of a described task."""
    data: str | None = None
    """Folder of its files."""
    seeds: tuple[int, ...] = (17, 18, 19, 20, 21)
    protocol: dict[str, Any] = Field(default_factory=dict)
    """What differs from the task's protocol."""


class Study(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = ""
    recipe: str
    """A shipped recipe, or a YAML file beside the study's."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe set in every trial."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Key -> its values; every combination is a trial. Besides the recipe's keys by dotted path: `parameters` (a model
    of that size), `decay_share` (the share of all steps that the last phase has) and `frozen_share` ([from, to], the
    part of the depth that is frozen in the first phase, as [0, 0.34] for the lowest third)."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> the keys that make this arm. Arms share data and compute at every point of the grid."""
    baseline: str | None = None
    """The arm the others are compared with; the first if not given."""
    evaluate: tuple[Evaluated, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    name: str
    arm: str | None
    point: dict[str, Any]
    config: RunConfig


def load_study(reference: str, recipe: str | None = None, overrides: Sequence[str] = ()) -> tuple[Study, Path]:
    """A study YAML or a shipped name, with another recipe and `key=value` for every trial; and its folder."""
    tree, folder = read_mapping(reference, "study", SHIPPED)
    study = validate(Study, tree, reference)
    common = dict(study.common)
    for override in overrides:
        key, _, value = override.partition("=")
        common[key] = read_yaml(value, override)
    return study.model_copy(update={"common": common, "recipe": recipe or study.recipe}), folder


def expand(study: Study, folder: Path) -> list[Trial]:
    """Every trial with its resolved configuration. InputError for a wrong key, or arms that cannot be compared."""
    if study.baseline is not None and study.baseline not in study.arms:
        raise InputError(f"study {study.name}: baseline: no arm {study.baseline!r}; arms: {', '.join(study.arms)}")
    for key, values in study.grid.items():
        if not values:
            raise InputError(f"study {study.name}: grid.{key}: needs one value or more")
    beside = folder / study.recipe
    recipe = str(beside) if beside.is_file() else study.recipe
    trials = []
    for chosen in itertools.product(*study.grid.values()):
        point = dict(zip(study.grid, chosen, strict=True))
        arms = [_trial(study, recipe, arm, point) for arm in study.arms or [None]]
        for other in arms[1:]:
            _require_comparable(study, arms[0], other)
        trials += arms
    names = [trial.name for trial in trials]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"study {study.name}: the same trial twice: {', '.join(sorted(twice))}; give each value once")
    return trials


def _trial(study: Study, recipe: str, arm: str | None, point: dict[str, Any]) -> Trial:
    words = [*([arm] if arm else []), *(f"{key}-{value}" for key, value in point.items())]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("-._") or study.name
    settings = {**study.common, **point, **(study.arms[arm] if arm else {})}
    plain = [f"{key}={json.dumps(value)}" for key, value in settings.items() if key not in DERIVED]
    try:
        config = load_config(recipe, [*plain, f"name={name}"])
        derived = _derived(config, {key: settings[key] for key in DERIVED if key in settings})
        config = load_config(recipe, [*plain, f"name={name}", *derived]) if derived else config
        _require_buildable(config)
    except InputError as error:
        raise InputError(f"study {study.name}, trial {name}: {error}") from None
    return Trial(name, arm, point, config)


def _derived(config: RunConfig, settings: dict[str, Any]) -> list[str]:
    """The overrides that the derived keys stand for."""
    overrides = []
    for key, value in settings.items():
        try:
            if key == "parameters":
                overrides += _of_parameters(config, value)
            elif key == "decay_share":
                overrides += _of_decay_share(config, float(value))
            else:
                first, last = map(float, value)
                depth = _architecture(config).num_hidden_layers
                overrides.append(f"phases.0.freeze={list(range(round(first * depth), round(last * depth)))}")
        except (ValueError, TypeError) as error:
            raise InputError(f"{key}: {value!r} will not do: {error}") from None
    return overrides


def _of_parameters(config: RunConfig, value: Any) -> list[str]:
    from datapipe.tokenizer import load_tokenizer
    from studies.sizes import model_shape

    shape = model_shape(parse_count(value), load_tokenizer(config.tokenizer).vocab_size)
    return ["model.init=scratch", "model.size=null", *(f"model.{key}={number}" for key, number in shape.items())]


def _of_decay_share(config: RunConfig, share: float) -> list[str]:
    """The steps of the last two phases divided anew, their sum kept."""
    if not 0 < share < 1 or len(config.phases) < 2:
        raise ValueError("it is a share between 0 and 1 of the last two phases")
    last = len(config.phases) - 1
    steps = sum(phase.length(config.tokens_per_step) for phase in config.phases[-2:])
    decay = max(1, round(share * steps))
    lengths = {last - 1: steps - decay, last: decay}
    return [
        o
        for phase, length in lengths.items()
        for o in (f"phases.{phase}.tokens=null", f"phases.{phase}.steps={length}")
    ]


def _architecture(config: RunConfig) -> Any:
    from datapipe.tokenizer import load_tokenizer
    from engine.modernbert.config import resolve_architecture

    return resolve_architecture(config.model, load_tokenizer(config.tokenizer))


def _require_buildable(config: RunConfig) -> None:
    from engine.parallel import plan

    plan(config, _architecture(config), config.parallel.tensor * config.parallel.pipeline)


def _require_comparable(study: Study, one: Trial, other: Trial) -> None:
    """Arms of one point see the same data in the same order through a model of the same shape for as many steps."""
    changed = [
        line
        for line in differences(one.config, other.config)
        if line.startswith(SHARED) or (line.startswith("model.") and not line.startswith("model.init:"))
    ]
    if one.config.model.init != other.config.model.init:
        shapes = [_architecture(trial.config).to_dict() for trial in (one, other)]
        changed += [f"model.{key}" for key in shapes[0] if shapes[0][key] != shapes[1].get(key)]
    steps = [trial.config.total_steps for trial in (one, other)]
    if steps[0] != steps[1]:
        changed.append(f"total steps: {steps[0]:,} -> {steps[1]:,}, of {one.config.tokens_per_step:,} token slots each")
    if changed:
        raise InputError(
            f"study {study.name}: arms {one.arm!r} and {other.arm!r} share neither data nor compute in full, so a "
            "difference between them would say nothing\n  "
            + "\n  ".join(changed)
            + "\nmove these keys to `grid`, or make them equal"
        )


def dump_study(study: Study) -> str:
    return yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
