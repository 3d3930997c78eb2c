"""Messages for the faults that pydantic finds: the wrong key, what it takes, and what it was given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from configs.errors import nearest
from configs.schema.run import BETWEEN_SECTIONS
from configs.schema.section import TRUTH_VALUE
from configs.type_words import alternatives, is_section, type_words

Location = tuple[str | int, ...]

_BOUNDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "too_short": "needs at least {min_length} entry",
    "too_long": "takes at most {max_length} entries",
    "string_pattern_mismatch": "takes letters, digits, '.', '_' and '-', after a letter or digit at its beginning",
}
"""Messages by the type of a pydantic error. Errors of other types say that a value has the wrong type."""


def faults(schema: type[BaseModel], tree: Any, error: ValidationError) -> list[tuple[str | None, str]]:
    """Return each wrong key of a mapping once, with the reason and remedy. The key is None for the whole mapping.

    Args:
        schema: The section that the mapping was validated as.
        tree: The mapping.
        error: The error of the validation.
    """
    found: dict[str | None, str] = {}
    by_key: dict[Location, list[Any]] = {}
    for item in error.errors():
        if item["type"] == BETWEEN_SECTIONS:
            found |= dict(item["ctx"]["faults"])
        else:
            by_key.setdefault(_key(schema, item), []).append(item)
    for key, items in by_key.items():
        # A union has an error per alternative: one about the value says more than one about the type.
        telling = [item for item in items if item["type"] in _BOUNDS] or items
        found[".".join(map(str, key)) or None] = _reason(schema, tree, key, telling[0])
    return list(found.items())


def _key(schema: type[BaseModel], item: Any) -> Location:
    """Return the key of an error: its location without the alternative of a union that pydantic appends."""
    location: Location = item["loc"]
    if item["type"] in ("extra_forbidden", "invalid_key"):
        return location
    known = location[: sum(1 for _ in _types_along(schema, location)) - 1]
    if item["type"] == "missing" and known and isinstance(known[-1], int):  # the list above is too short
        return known[:-1]
    return known


def _types_along(schema: Any, location: Sequence[str | int]) -> Iterator[Any]:
    """Yield the type of the schema, then of each key below it on the way to a location, as far as there are keys."""
    annotation = schema
    yield annotation
    for part in location:
        for kind in alternatives(annotation):
            inner = _type_below(kind, part)
            if inner is not None:
                break
        else:
            return
        annotation = inner
        yield annotation


def _type_below(kind: Any, part: str | int) -> Any | None:
    """Return the type of an entry of a section, list or mapping; None if there is no such entry."""
    arguments = get_args(kind)
    if is_section(kind):
        return kind.model_fields[part].annotation if part in kind.model_fields else None
    if get_origin(kind) is tuple and isinstance(part, int):
        return arguments[0] if arguments[-1] is Ellipsis or part >= len(arguments) else arguments[part]
    if get_origin(kind) is dict and isinstance(part, str) and part != "[key]":
        return arguments[1]
    return None


def _reason(schema: type[BaseModel], tree: Any, key: Location, item: Any) -> str:
    """Return the reason and remedy of a pydantic error."""
    kind = item["type"]
    if kind == "extra_forbidden":
        known = [name for section in _sections_at(schema, key[:-1]) for name in section.model_fields]
        return f"no such key; {nearest(str(key[-1]), known, 'known here:')}"
    if kind == "missing" and key == item["loc"]:
        return "missing; this key is required"
    if kind == "invalid_key":
        return "keys are texts; quote it"
    value = _value_at(tree, key)
    if value is None:
        remedy = "" if _is_required(schema, key) else ", or remove the key"
        return f"has no value; expected {_expected(schema, key)}{remedy}"
    given = "" if len(str(value)) > 80 else f", got {value!r}"
    if kind == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        return message if ", got " in message or isinstance(value, dict | list) else message + given
    if kind == TRUTH_VALUE:
        given += "; YAML reads yes, no, on and off as true and false, so quote a text"
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**item.get("ctx", {})) + given
    return f"expected {_expected(schema, key)}{given}"


def _is_required(schema: type[BaseModel], key: Location) -> bool:
    """Return whether a section must have the key."""
    fields = [section.model_fields.get(str(key[-1])) for section in _sections_at(schema, key[:-1])]
    return any(field is not None and field.is_required() for field in fields)


def _expected(schema: type[BaseModel], key: Location) -> str:
    """Return the words for what a key takes; the keys of a section."""
    if sections := _sections_at(schema, key):
        return f"a mapping of keys such as {', '.join(list(sections[0].model_fields)[:4])}"
    *_, annotation = _types_along(schema, key)
    return ("one of " if get_origin(annotation) is Literal or annotation is bool else "") + type_words(annotation)


def _sections_at(schema: type[BaseModel], key: Location) -> list[type[BaseModel]]:
    """Return the sections that a key takes; a union may have several."""
    *_, annotation = _types_along(schema, key)
    return [kind for kind in alternatives(annotation) if is_section(kind)]


def _value_at(tree: Any, key: Location) -> Any:
    """Return the value of a key in a mapping; None if the schema has derived it from others."""
    for part in key:
        try:
            tree = tree[part]
        except (LookupError, TypeError):
            return None
    return tree
