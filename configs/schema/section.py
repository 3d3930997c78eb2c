"""The base of every section, and the types that several sections use."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

TRUTH_VALUE = "truth-value"
"""The type of the pydantic error for `true` or `false` in the place of a number or a text."""

Paths = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""One path or a list of paths."""


class Section(BaseModel):
    """A mapping of a recipe: immutable, without unknown keys, documented by the docstrings below its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError(TRUTH_VALUE, "true and false are no values of this key")
        return value
