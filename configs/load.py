"""From a recipe and overrides to a validated `RunConfig`, with every error of the file reported at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from configs.errors import InputError
from configs.schema import RunConfig

RECIPES = resources.files("configs") / "recipes"
S = TypeVar("S", bound=BaseModel)
MAY_CHANGE = re.compile(
    r"(cluster|parallel|checkpoint|monitoring)\.|batch\.micro|data\.(on_error|backend|prefetch|cache|cache_gb|patience):"
    r"|data\.(sources\.\d+|evaluation)\.(shards|text)"
)
"""Keys that say where and how a run is executed; everything else says what it computes.

Shards may lie elsewhere: a checkpoint knows the data by its content, and refuses any other.
"""


def shipped(folder: Traversable) -> dict[str, str]:
    """Name -> text of every YAML file in a folder of the package, by name."""
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def read_mapping(reference: str, kind: str, folder: Traversable) -> tuple[dict[str, Any], Path]:
    """The mapping in a YAML file, or in the one of that name in a folder of the package; and where it lies: the file's
    folder, or the working directory. Raises InputError, which calls it a `kind`.
    """
    path, ours = Path(reference), shipped(folder)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            text, home = path.read_text(encoding="utf-8"), path.parent
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{kind} {reference}: {getattr(error, 'strerror', None) or error}") from None
    elif reference in ours:
        text, home = ours[reference], Path()
    else:
        near = difflib.get_close_matches(reference, ours, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ours)}"
        raise InputError(f"no {kind} {reference!r}: neither a YAML file nor one of the package; {hint}")
    tree = read_yaml(text, f"{kind} {reference}")
    if not isinstance(tree, dict):
        raise InputError(f"{kind} {reference} is empty or not a mapping; complete ones are {', '.join(ours)}")
    return tree, home


def read_yaml(text: str, origin: str) -> Any:
    """Read YAML as OmegaConf does: 2e-4 is a number, which it is not in YAML 1.1, and duplicate keys are refused."""
    try:
        tree = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{origin} is not valid YAML: {error}") from None
    return OmegaConf.to_container(tree)["value"]  # type: ignore[index, call-overload]


def load_config(recipe: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve RECIPE (a YAML file or a shipped name; None: ./detour.yaml, else `demo`) and `key=value` overrides.

    Raises InputError naming every wrong key with the nearest right one.
    """
    if recipe is None:
        recipe = "detour.yaml" if Path("detour.yaml").exists() else "demo"
    tree = OmegaConf.create(read_mapping(recipe, "recipe", RECIPES)[0])
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise InputError(f"{override!r} is not an override; write key=value, for instance batch.sequences=8")
        try:
            OmegaConf.update(tree, key, OmegaConf.from_dotlist(["value" + override[len(key) :]]).value, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"{override!r} cannot be applied to {recipe}: {_first_line(error)}") from None
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{recipe}: {_first_line(error)}") from None
    return validate(RunConfig, plain, recipe)


def validate(schema: type[S], tree: Any, origin: str) -> S:
    """A plain dict -> a section of a file; InputError with one line for each wrong key."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(schema, item) for item in error.errors()]
        raise InputError(f"{origin}: {len(lines)} error{'s' * (len(lines) > 1)}\n  " + "\n  ".join(lines)) from None


def dump_config(config: RunConfig) -> str:
    """The YAML of a resolved configuration; `load_config` of it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Human-readable `key: old -> new` of every leaf in which two configurations differ."""
    left, right = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    return [
        f"{key}: {left.get(key, 'absent')} -> {right.get(key, 'absent')}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def changes_of_run(old: RunConfig, new: RunConfig) -> list[str]:
    """The `differences` that make another run of it; empty where `new` may go on with what `old` began."""
    return [line for line in differences(old, new) if not MAY_CHANGE.match(line)]


def _explain(schema: type[BaseModel], item: Any) -> str:
    location = item["loc"]
    key = ".".join(str(part) for part in location) or "(whole file)"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _fields(schema, location[:-1]), n=1)
        return f"{key}: no such key; " + (
            f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(_fields(schema, location[:-1]))}"
        )
    if item["type"] == "missing":
        return f"{key}: missing; this key is required"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) and repr(given) not in message else ""
    return f"{key}: {message}{shown}"


def _fields(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names of the keys allowed at a place of the schema."""
    model = schema
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inner = [annotation, *get_args(annotation)]
            model = next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), model)
    return list(model.model_fields)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None or not tree:
        return {prefix.rstrip("."): tree}
    return {key: value for name, sub in items for key, value in _leaves(sub, f"{prefix}{name}.").items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
