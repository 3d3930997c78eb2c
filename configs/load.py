"""Load a recipe and its overrides into a validated `RunConfig`. All errors of a file are reported at once."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from configs.errors import InputError, nearest
from configs.messages import faults
from configs.schema import RunConfig

RECIPES = resources.files("configs") / "recipes"
S = TypeVar("S", bound=BaseModel)
_SHARDS = r"data\.(sources\.\d+|evaluation)\.(shards|text)"
MAY_CHANGE = re.compile(
    r"(cluster|parallel|checkpoint|monitoring)\.|batch\.(micro|recompute)|phases\.\d+\.batch\.micro"
    r"|data\.(on_error|backend|prefetch|cache|cache_gb|patience):"
    rf"|{_SHARDS}"
)
"""Matches keys that decide where and how a run is executed. All other keys decide what it computes.

Shards may move, because a checkpoint identifies its data by content.
"""

_NOT_DECIMAL = re.compile(r"[-+]?0[0-7_]+|[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+")
_NEGATIVE_INDEX = re.compile(r"\.-\d+(\.|$)|\[-\d+\]")
_IS_DATA = re.compile(_SHARDS)
_SOURCE_OF_PHASE = re.compile(r"(phases(?:\.\d+|\[\d+\])\.sources)\.([^\[\]]+)")
_MAPPING_OF_NAMES = re.compile(r"phases(\.\d+|\[\d+\])\.(sources|objective)|model\.rope_parameters")


def shipped(folder: Traversable) -> dict[str, str]:
    """Return the text of each YAML file in a folder of the package by the file's name, in alphabetical order."""
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name.removesuffix(".yaml"))
        if entry.name.endswith(".yaml")
    }


def read_mapping(reference: str, kind: str, folder: Traversable) -> tuple[dict[str, Any], Path]:
    """Read a mapping from a YAML file, or from the file of that name in a folder of the package.

    Args:
        reference: Path of a YAML file, or the name of a shipped file.
        kind: Word for the file in messages, such as `recipe`.
        folder: Folder of the shipped files.

    Returns:
        The mapping, and the directory of the file; the working directory for a shipped file.

    Raises:
        InputError: The file is missing, unreadable, or no mapping.
    """
    path, ours = Path(reference), shipped(folder)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        text, home = _read_text(path, kind, ours), path.parent
    elif reference in ours:
        text, home = ours[reference], Path()
    else:
        hint = nearest(reference, ours, "there are")
        raise InputError(
            f"no {kind} {reference!r}: it is neither a YAML file nor a shipped {kind}; {hint}", code="unknown-name"
        )
    tree = read_yaml(text, f"{kind} {reference}")
    if not isinstance(tree, dict):
        raise InputError(
            f"{kind} {reference} is empty or not a mapping; complete examples are {', '.join(ours)}",
            code="not-a-mapping",
        )
    return tree, home


def _read_text(path: Path, kind: str, ours: Collection[str]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors of Windows put a byte order mark first
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start:,}); save it as UTF-8"
    except OSError as error:
        reason = "a directory; name the file in it" if path.is_dir() else error.strerror or str(error)
        if not path.exists() and path.stem in ours:
            reason += f"; the shipped {kind} is called {path.stem}, without a suffix"
    raise InputError(f"{kind} {path}: {reason}", code="file-unreadable")


def read_yaml(text: str, origin: str) -> Any:
    """Read YAML as OmegaConf does: 2e-4 is a number, which it is not in YAML 1.1, and duplicate keys are refused."""
    try:
        _require_decimal(text, origin)
        tree = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{origin} is not valid YAML: {error}", code="invalid-yaml") from None
    except RecursionError:
        raise InputError(
            f"{origin}: its values are nested too deeply, or an anchor contains itself", code="invalid-yaml"
        ) from None
    return OmegaConf.to_container(tree)["value"]  # type: ignore[index, call-overload]


def require_no_comment(override: str, key: str) -> None:
    """Raise InputError if YAML would take a part of an override's value for a comment."""
    text = override[len(key) + 1 :]
    try:
        scalars = [token for token in yaml.scan(text, Loader=yaml.SafeLoader) if isinstance(token, yaml.ScalarToken)]
    except yaml.YAMLError:
        return  # reading the value will tell
    for sign in re.finditer("#", text):
        if not any(token.start_mark.index <= sign.start() < token.end_mark.index for token in scalars):
            message = f"{override!r}: YAML takes `{text[sign.start() :]}` for a comment; quote a text: '{key}=\"...\"'"
            raise InputError(message, key=key, code="override-malformed")


def _require_decimal(text: str, origin: str) -> None:
    """Raise InputError for numbers that YAML 1.1 reads otherwise than a person: 010 as octal, 12:30 to the base 60."""
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.ScalarToken) and token.plain and _NOT_DECIMAL.fullmatch(token.value):
            raise InputError(
                f"{origin}, line {token.start_mark.line + 1}: YAML reads {token.value} as "
                f"{yaml.safe_load(token.value)}; write a decimal number, or quote it if it is a text",
                code="number-not-decimal",
            )


def load_config(recipe: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a recipe and apply overrides.

    Args:
        recipe: YAML file or name of a shipped recipe. None: `./detour.yaml` if it exists, else `demo`.
        overrides: `key=value` with dotted keys.

    Raises:
        InputError: A key or value is wrong. The message names each wrong key and the nearest right key.
    """
    if recipe is None:
        recipe = "detour.yaml" if Path("detour.yaml").exists() else "demo"
    tree = OmegaConf.create(read_mapping(recipe, "recipe", RECIPES)[0])
    for override in overrides:
        _apply(tree, override, recipe)
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{recipe}: {_first_line(error)}", code="invalid-yaml") from None
    return validate(RunConfig, plain, recipe)


def _apply(tree: Any, override: str, recipe: str) -> None:
    """Set the key of an override in an OmegaConf tree.

    Raises:
        InputError: The override is malformed, or has no place in the recipe.
    """
    key, equals, _ = override.partition("=")
    if not equals or not key:
        message = f"{override!r} is not an override; write key=value, for example batch.sequences=8, after the recipe"
        raise InputError(message, key=key or None, code="override-malformed")
    if _NEGATIVE_INDEX.search(key):
        message = f"{override!r}: entries of a list are numbered from 0 and not from the end"
        raise InputError(message, key=key, code="override-malformed")
    require_no_comment(override, key)
    try:
        _require_decimal(override[len(key) + 1 :], repr(override))
        value = OmegaConf.to_container(OmegaConf.from_dotlist(["value" + override[len(key) :]]))["value"]  # type: ignore[index, call-overload]
        path = _SOURCE_OF_PHASE.sub(r"\1[\2]", key)  # names of sources may have dots
        OmegaConf.update(tree, path, value, merge=not _MAPPING_OF_NAMES.fullmatch(key), force_add=True)
    except IndexError:
        name = re.split(r"\.\d+", key)[0]
        message = (
            f"{override!r} is past the end of {name}, whose entries in {recipe} are numbered from 0; add the entry "
            "in a recipe file of your own"
        )
        raise InputError(message, key=key, code="override-past-the-end") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = _first_line(error)
        if "Cannot merge" in reason:
            reason = "a list cannot take the place of a mapping, nor a mapping that of a list"
        elif isinstance(error, yaml.YAMLError):
            reason += f"; quote the value if it is text: '{key}=\"...\"'"
        message = f"{override!r} cannot be applied to {recipe}: {reason}"
        raise InputError(message, key=key, code="override-malformed") from None


def validate(schema: type[S], tree: Any, origin: str) -> S:
    """Validate a plain mapping as a section.

    Args:
        schema: The section.
        tree: The mapping.
        origin: Name of the file in messages.

    Raises:
        InputError: One line per wrong key; `key` is the first wrong key.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        found = faults(schema, tree, error)
        lines = [f"\n  {key or '(whole file)'}: {reason}" for key, reason in found]
        message = f"{origin}: {len(lines)} error{'s' * (len(lines) > 1)}" + "".join(lines)
        raise InputError(message, key=found[0][0], code="invalid-config") from None


class _Dumper(yaml.SafeDumper):
    """Writes texts so that OmegaConf reads them as they are."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Quote a text such as 3e-4, which is a number to OmegaConf, and escape `${`, which begins an interpolation."""
    style = "'" if _FLOAT.fullmatch(text) else None
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", escaped, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_config(config: RunConfig) -> str:
    """Return the YAML of a configuration. `load_config` of it returns an equal configuration."""
    tree = config.model_dump(mode="json", exclude_none=True)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return `key: old -> new` for each key in which two configurations differ."""
    left, right = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    return [
        f"{key}: {left.get(key, 'absent')} -> {right.get(key, 'absent')}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def changes_of_run(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the `differences` that change what a run computes. Empty if `new` may continue a run of `old`."""
    return [line for line in differences(old, new) if not MAY_CHANGE.match(line)]


def content_of_run(config: RunConfig, varied: Collection[str] = ()) -> str:
    """Return what a run computes as text, equal for runs with equal results: no name, no keys of how it is executed.

    Args:
        config: The configuration.
        varied: Keys that are part of it in any case, because a study compares their values.
    """
    leaves = _leaves(config.model_dump(mode="json", exclude={"name"}))
    kept = {
        key: value
        for key, value in sorted(leaves.items())
        if key in varied or _IS_DATA.match(key) or not MAY_CHANGE.match(f"{key}:")
    }
    return json.dumps(kept)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None or not tree:
        return {prefix.rstrip("."): tree}
    return {key: value for name, sub in items for key, value in _leaves(sub, f"{prefix}{name}.").items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
