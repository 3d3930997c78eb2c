"""The base of every section, and the types that several sections use."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

Paths = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""One path or a list of paths."""


class Section(BaseModel):
    """A mapping of a recipe: immutable, without unknown keys, documented by the docstrings below its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
