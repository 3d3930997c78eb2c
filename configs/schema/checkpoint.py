"""`checkpoint`: when checkpoints are written, and which ones are kept."""

from __future__ import annotations

from pydantic import PositiveInt, field_validator

from configs.schema.section import Section
from configs.units import Duration


class Checkpoint(Section):
    """When checkpoints are written, and which ones are kept."""

    every: Duration = Duration(500, "steps")
    """Interval in steps, tokens or minutes. The end of a phase and of the run always write a checkpoint."""
    keep: PositiveInt = 3
    """Newest checkpoints that are kept. Those at the end of a phase are always kept."""
    keep_every: PositiveInt | None = None
    """Steps. Checkpoints at multiples of this number are kept besides the newest."""
    mirror: str | None = None
    """URL (s3://, gs://) or shared path that checkpoints are copied to. A run without local checkpoints uses it."""

    @field_validator("every")
    @classmethod
    def _not_zero(cls, value: Duration) -> Duration:
        if value.value == 0:
            raise ValueError("the checkpoint interval must be greater than 0")
        return value
