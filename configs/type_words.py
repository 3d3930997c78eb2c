"""Words for the types of the schema, in the configuration page and in messages."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from configs.schema import Section
from configs.units import Duration

_WORDS = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "`true`, `false`",
    Duration: "duration",
    type(None): "no value",
    Any: "any value",
}


def type_words(annotation: Any) -> str:
    """Return the words for a type of the schema."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {type_words(arguments[0])}"
    if origin is tuple:
        many = arguments[-1] is Ellipsis
        return f"list of {type_words(arguments[0])}" if many else f"[{', '.join(map(type_words, arguments))}]"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return type_words(arguments[0])
    if is_section(annotation):
        return "section"
    if origin is dict:
        return "mapping"
    return _WORDS[annotation]


def alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types that a union admits, without their constraints; the type itself if it is no union."""
    if hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from alternatives(part)
    else:
        yield annotation


def is_section(kind: Any) -> bool:
    """Return whether a type is a section of the schema."""
    return isinstance(kind, type) and issubclass(kind, Section)
