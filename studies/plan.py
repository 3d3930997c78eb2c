"""The plan of a study: a recipe, a grid over its keys, and arms that are compared at every grid point."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from configs.errors import InputError
from configs.load import RECIPES, content_of_run, differences, read_mapping, validate
from configs.schema import RunConfig, Section
from studies.derived import DERIVED, architecture_of, load_derived
from studies.rule import FINE_TUNED, PROBE, Rule
from studies.tasks import EvaluatedTask, parse_overrides

SHIPPED = resources.files("studies") / "shipped"
SHARED = ("data.", "tokenizer", "batch.sequences")
"""Keys that decide the order of the data; all arms have the same values."""


class Study(Section):
    """A study YAML."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = ""
    recipe: str
    """A shipped recipe, or a YAML file in the folder of the study."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe that are set in every trial."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Key -> its values; every combination is a grid point. A key is a dotted path of the recipe, or a derived key.

    `parameters`: size of a new model. `lr_of_base`: learning rate at width 768; other widths have it times 768 / width.
    `tokens`: those of the last two phases. `decay_share`: the last phase's share of them. `decay_ratio`: the last
    phase's steps per step of the phase before. `decay_floor`: fewest updates of the last phase. `frozen_share`: part of
    the depth that is frozen in the first phase; [0, 0.36] is layers 0 to 7 of 22. `frozen_share_of_decay`: the same in
    the last phase."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> the keys that make this arm. At each grid point the arms share data and compute."""
    baseline: str | None = None
    """Arm that the others are compared with; default: the first."""
    evaluate: tuple[EvaluatedTask, ...] = ()
    """Tasks that every trained model is measured by."""
    held_out: dict[str, Any] | None = None
    """Held-out text of a recipe that has none: the keys of `data.evaluation`."""
    rule: Rule | None = None
    """Decision rule, fixed before the first step. Needs arms."""
    toy: bool = False
    """Whether sizes, text and tasks are those of `--toy`, which the page says."""

    @field_validator("grid", mode="before")
    @classmethod
    def _has_lists(cls, grid: Any) -> Any:
        for key, values in grid.items() if isinstance(grid, dict) else ():
            if not isinstance(values, list):
                raise ValueError(f"{key}: expected a list of values, got {values!r}")
        return grid


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    name: str
    """Arm and grid point, for people."""
    arm: str | None
    """None if the study has no arms."""
    point: dict[str, Any]
    """Grid point: key -> value."""
    config: RunConfig
    """Resolved configuration, without a name of its own."""
    varied: frozenset[str] = frozenset()
    """Keys that its arm and grid point set."""

    @property
    def address(self) -> str:
        """Digest of what the run computes. Trials of any study with the same address have the same result."""
        content = content_of_run(self.config, self.varied)
        return hashlib.sha256(content.encode()).hexdigest()[:10]


def load_study(reference: str, recipe: str | None = None, overrides: Sequence[str] = ()) -> tuple[Study, Path]:
    """Load a study and the folder that its recipe is looked for in.

    An override names a key of the study (`baseline=mlm`, `evaluate=[...]`, `grid.KEY=[...]`, `arms.NAME.KEY=...`), a
    key of the grid, whose values it replaces, or a key of the recipe, which it sets in every trial.

    Args:
        reference: A study YAML or the name of a shipped study.
        recipe: Recipe that replaces the study's.
        overrides: `key=value` words.

    Raises:
        InputError: A key is wrong or changes nothing.
    """
    tree, folder = read_mapping(reference, "study", SHIPPED)
    values = parse_overrides(overrides)
    for key, value in values.items():
        _override(tree, key, value)
    if recipe is not None:
        tree["recipe"] = recipe
    study = validate(Study, tree, reference)
    for key in values:
        by_arms = study.arms and all(key in settings for settings in study.arms.values())
        by_size = key.startswith("model.") and "parameters" in {*study.grid, *study.common}
        if by_arms or by_size:
            other = "every arm sets it; override arms.NAME." + key if by_arms else "`parameters` sets the model's shape"
            raise InputError(f"{key}: this override changes nothing, because {other}", key=key, code="without-effect")
    return study, folder


def _override(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set one key of a study's tree; None removes a grid key or an arm."""
    section, _, rest = key.partition(".")
    values = value if isinstance(value, list) or value is None else [value]
    if key in _mapping(tree, "grid"):
        _set(tree, "grid", key, values)
    elif section == "grid" and rest:
        _set(tree, "grid", rest, values)
    elif section == "arms" and rest:
        arm, _, inner = rest.partition(".")
        if inner:
            settings = dict(_mapping(_mapping(tree, "arms"), arm, f"arms.{arm}"))
            settings[inner] = value
            value = settings
        _set(tree, "arms", arm, value)
    elif section == "evaluate" and rest:
        number, _, inner = rest.partition(".")
        tasks = tree.get("evaluate") or []
        if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
            raise InputError(
                f"{key}: `evaluate` of the study is no list of tasks; write evaluate: [{{task: NAME}}]", key="evaluate"
            )
        if not number.isdigit() or int(number) >= len(tasks) or not inner:
            raise InputError(f"{key}: the study has {len(tasks)} tasks; write evaluate.0.seeds=[17]", key=key)
        _set(tasks[int(number)], "protocol", inner.removeprefix("protocol."), value) if inner.startswith(
            "protocol."
        ) else tasks[int(number)].update({inner: value})
    elif section in ("rule", "held_out") and rest:
        _set(tree, section, rest, value)
    elif key in Study.model_fields:
        tree[key] = value
    else:
        _set(tree, "common", key.removeprefix("common."), value)


def _set(tree: dict[str, Any], section: str, key: str, value: Any) -> None:
    changed = {**_mapping(tree, section), key: value}
    if value is None and section in ("grid", "arms"):
        del changed[key]
    tree[section] = changed


def _mapping(tree: dict[str, Any], key: str, name: str | None = None) -> dict[str, Any]:
    """Return a section that an override changes; empty if there is none.

    Raises:
        InputError: The section holds something else than keys and values.
    """
    section = tree.get(key) or {}
    if not isinstance(section, dict):
        name = name or key
        message = f"{name}: the study has {section!r} here; write keys with values, as {name}: {{KEY: VALUE}}"
        raise InputError(message, key=name)
    return section


def expand(study: Study, folder: Path) -> list[Trial]:
    """List every trial with its resolved configuration.

    Raises:
        InputError: A key is wrong, or arms cannot be compared.
    """
    if study.baseline is not None and study.baseline not in study.arms:
        raise InputError(
            f"study {study.name}: baseline: no arm {study.baseline!r}; arms: {', '.join(study.arms)}", key="baseline"
        )
    if study.rule is not None:
        _require_decidable(study)
    for key, values in study.grid.items():
        if not values:
            raise InputError(f"study {study.name}: grid.{key}: needs one value or more", key=f"grid.{key}")
    crossed = [key for key, values in study.grid.items() if is_seed(key) and len(values) > 1]
    if study.arms and len(crossed) > 1:
        raise InputError(
            f"study {study.name}: grid: {' and '.join(crossed)} are crossed, and intervals take pairs that share a "
            f"seed for independent ones; give several values to {crossed[0]} alone",
            key=f"grid.{crossed[1]}",
            code="seeds-crossed",
        )
    beside = folder / study.recipe
    recipe = str(beside) if beside.is_file() else study.recipe
    if study.held_out is not None and (read_mapping(recipe, "recipe", RECIPES)[0].get("data") or {}).get("evaluation"):
        study = study.model_copy(update={"held_out": None})  # the recipe has its own
    trials = []
    for chosen in itertools.product(*study.grid.values()):
        point = dict(zip(study.grid, chosen, strict=True))
        arms = [_trial(study, recipe, arm, point) for arm in study.arms or [None]]
        for other in arms[1:]:
            _require_comparable(study, arms[0], other)
        trials += arms
    names = Counter(trial.name for trial in trials)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise InputError(
            f"study {study.name}: grid: the same trial twice: {', '.join(sorted(repeated))}; give each value once",
            key="grid",
        )
    addresses: dict[str, Trial] = {}
    for trial in trials:
        twin = addresses.setdefault(trial.address, trial)
        if twin is not trial:
            raise InputError(
                f"study {study.name}: {twin.name} and {trial.name} compute the same, so their difference is none; "
                "give each arm and grid value an effect of its own",
                key="arms" if twin.arm != trial.arm else "grid",
                code="same-trial",
            )
    return trials


def is_seed(key: str) -> bool:
    """Return whether a grid key is a seed, over whose values differences are averaged."""
    return key.rpartition(".")[2] == "seed"


def decay_of(trial: Trial) -> dict[str, Any]:
    """Return the part of a grid point that sets the length of the last phase."""
    last = len(trial.config.phases) - 1
    keys = {"decay_ratio", "decay_share", "decay_floor", f"phases.{last}.steps", f"phases.{last}.tokens"}
    return {key: chosen for key, chosen in trial.point.items() if last > 0 and key in keys}


def settings_read(points: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> int:
    """Count the settings that a rule reads, from grid points and the part of each that sets the decay."""
    return len({str({k: v for k, v in point.items() if not is_seed(k) and k not in decay}) for point, decay in points})


def order_of(trial: Trial) -> str:
    """Return the seeds of a trial; trials of other seeds are other orders."""
    return json.dumps({key: value for key, value in trial.point.items() if is_seed(key)})


def orders_of(trials: Sequence[Trial]) -> list[str]:
    """List the orders of the trials, each once."""
    return list(dict.fromkeys(map(order_of, trials)))


def _require_decidable(study: Study) -> None:
    """Require that the study measures every outcome of its rule."""
    assert study.rule is not None
    ways = {way for task in study.evaluate for way in task.by}
    known = {Path(task.task).stem for task in study.evaluate} | {name for name in (PROBE, FINE_TUNED) if name in ways}
    missing = [outcome for outcome in study.rule.outcomes if outcome not in known]
    for outcome in study.rule.outcomes:
        named = [task for task in study.evaluate if Path(task.task).stem == outcome]
        if outcome not in ways and len([task for task in named if FINE_TUNED in task.by] or named) > 1:
            raise InputError(
                f"study {study.name}: rule.outcomes: {outcome} is several tasks of `evaluate`, whose scores "
                "have no common mean; name another outcome, or keep one of them",
                key="rule.outcomes",
                code="outcome-ambiguous",
            )
    if len(study.arms) < 2 or missing:
        reason = (
            f"nothing measures {', '.join(missing)}" if missing else "it compares arms, and there are fewer than two"
        )
        raise InputError(
            f"study {study.name}: rule.outcomes: {reason}; measured are {', '.join(sorted(known)) or 'no tasks'}; "
            "add tasks to `evaluate`, or name other outcomes",
            key="rule.outcomes",
            code="outcome-not-measured",
        )


def trunks_of(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Return the trunk of each trial that shares its phases, except the last, with another trial.

    A trunk is trained once, and the trials branch off its end. Their results are those of whole runs, to the bit.

    Returns:
        Address of a trial -> its trunk, a run of all phases but the last.
    """
    groups: defaultdict[str, list[tuple[Trial, Trial]]] = defaultdict(list)
    for trial in trials:
        phases = trial.config.phases[:-1]
        used = {name for phase in phases for name in phase.sources or [s.name for s in trial.config.data.sources]}
        if len(used) == len(trial.config.data.sources):  # else the trunk would name a source that it does not use
            trunk = Trial("trunk", None, {}, trial.config.model_copy(update={"phases": phases}))
            groups[trunk.address].append((trial, trunk))
    return {trial.address: trunk for group in groups.values() if len(group) > 1 for trial, trunk in group}


def dump_study(study: Study) -> str:
    """Write a study as YAML."""
    return yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def _trial(study: Study, recipe: str, arm: str | None, point: dict[str, Any]) -> Trial:
    words = [*([arm] if arm else []), *(f"{key}-{value}" for key, value in point.items())]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("-._") or study.name
    settings = {**study.common, **point, **(study.arms[arm] if arm else {})}
    plain = [f"{key}={json.dumps(value)}" for key, value in settings.items() if key not in DERIVED]
    if study.held_out is not None:
        plain.insert(0, f"data.evaluation={json.dumps(study.held_out)}")
    plain = [*(f"{key}=null" for key in _replaced_lengths(settings)), *plain]
    try:
        config = load_derived(recipe, plain, settings)
        _require_buildable(config)
    except InputError as error:
        raise InputError(f"study {study.name}, trial {name}: {error}", key=error.key, code=error.code) from None
    return Trial(name, arm, point, config, frozenset({*point, *(study.arms[arm] if arm else {})}))


def _replaced_lengths(settings: dict[str, Any]) -> list[str]:
    """List the lengths of phases that settings give in the other unit than the recipe may."""
    other = {"tokens": "steps", "steps": "tokens"}
    given = [match for key in settings if (match := re.fullmatch(r"(phases\.\d+)\.(tokens|steps)", key))]
    return [key for match in given if (key := f"{match[1]}.{other[match[2]]}") not in settings]


def _require_buildable(config: RunConfig) -> None:
    from engine.parallel import plan

    plan(config, architecture_of(config), config.parallel.tensor * config.parallel.pipeline)


def _require_comparable(study: Study, one: Trial, other: Trial) -> None:
    """Require the same data in the same order, the same model shape and the same number of steps in two arms."""
    changed = [
        line
        for line in differences(one.config, other.config)
        if line.startswith(SHARED) or (line.startswith("model.") and not line.startswith("model.init:"))
    ]
    if one.config.model.init != other.config.model.init:
        shapes = [architecture_of(trial.config).to_dict() for trial in (one, other)]
        changed += [f"model.{key}" for key in shapes[0] if shapes[0][key] != shapes[1].get(key)]
    steps = [trial.config.total_steps for trial in (one, other)]
    if steps[0] != steps[1]:
        slots = one.config.spans[0].tokens_per_step
        changed.append(f"total steps: {steps[0]:,} -> {steps[1]:,}, of {slots:,} token slots each")
    if changed:
        raise InputError(
            f"study {study.name}: arms {one.arm!r} and {other.arm!r} do not share all data and compute, so their "
            "difference would not be due to one setting\n  "
            + "\n  ".join(changed)
            + "\nmove these keys to `grid`, or make them equal",
            key="arms",
            code="arms-not-comparable",
        )
