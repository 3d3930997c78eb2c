"""Typed quantities of a run: token counts and durations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, GetCoreSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*([kKmMbBtT]?)")
Unit = Literal["tokens", "steps", "minutes"]


def parse_count(value: Any) -> int:
    """Parse ``50B``, ``100M``, ``1.5k``, ``1e6`` or a plain number. Raises ValueError for anything else."""
    match = None if isinstance(value, bool) else _COUNT.fullmatch(str(value).strip().replace("_", ""))
    # Not a float, which would make 16.1k a fraction.
    number = Decimal(match[1]) * _SUFFIX[match[2].lower()] if match else Decimal("NaN")
    if number.is_nan() or number % 1:
        raise ValueError(f"expected a count such as 2M or 50B, got {value!r}")
    return int(number)


def format_count(value: float) -> str:
    """Format a count with three significant digits: 1_234_567 as ``1.23M``."""
    for suffix in ("T", "B", "M", "k"):
        if abs(value) >= _SUFFIX[suffix.lower()]:
            return f"{value / _SUFFIX[suffix.lower()]:.3g}{suffix}"
    return f"{value:.3g}"


Count = Annotated[
    int,
    BeforeValidator(parse_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": ["2M", "50B"]}]}),
]


@dataclass(frozen=True)
class Duration:
    """A length in tokens, steps or minutes: ``100M`` (tokens), ``100M tokens``, ``500 steps``, ``10 minutes``."""

    value: int
    unit: Unit

    @classmethod
    def parse(cls, value: Any) -> Duration:
        """Parse a duration. A bare count is in tokens. Raises ValueError."""
        if isinstance(value, Duration):
            return value
        words = str(value).split()
        unit = words[-1].lower() if len(words) > 1 else "tokens"
        unit = unit if unit.endswith("s") else unit + "s"
        if len(words) == 1 and words[0].endswith("m"):
            raise ValueError(f"write '10M tokens' for millions of tokens or '10 minutes', got {value!r}")
        try:
            if isinstance(value, bool) or len(words) > 2 or unit not in ("tokens", "steps", "minutes"):
                raise ValueError
            return cls(parse_count(words[0]), unit)  # type: ignore[arg-type]
        except (ValueError, IndexError):
            message = f"expected a duration such as '500 steps', '100M tokens' or '10 minutes', got {value!r}"
            raise ValueError(message) from None

    def steps(self, tokens_per_step: int) -> int:
        """Return the nearest number of optimizer steps. Raises ValueError for minutes."""
        if self.unit == "minutes":
            raise ValueError("a duration in minutes has no fixed number of steps")
        return self.value if self.unit == "steps" else round(self.value / tokens_per_step)

    def is_due(self, step: int, tokens: int, tokens_per_step: int, seconds_since_last: float = 0.0) -> bool:
        """Return whether an action at this interval is due after `step` completed steps.

        Args:
            step: Completed optimizer steps, from 1.
            tokens: Token slots of these steps, padding included. An interval in tokens is due in the step that
                completes a multiple of it.
            tokens_per_step: Token slots of the last of these steps.
            seconds_since_last: Seconds since the action was last done. Only intervals in minutes use it.
        """
        if self.unit == "minutes":
            return seconds_since_last >= 60.0 * self.value
        if self.unit == "steps":
            return step % self.value == 0
        return tokens // self.value > (tokens - tokens_per_step) // self.value

    def seconds(self, tokens_per_step: int, step_seconds: float) -> float:
        """Return the interval in seconds, if each step takes `step_seconds`."""
        if self.unit == "minutes":
            return 60.0 * self.value
        return max(1, self.steps(tokens_per_step)) * step_seconds

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"type": ["string", "integer"], "examples": ["100M tokens", "500 steps", "10 minutes"]}
