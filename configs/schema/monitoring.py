"""`monitoring`: metrics endpoint and logs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from configs.schema.section import Section
from configs.units import Duration


class Monitoring(Section):
    """Metrics endpoint and logs."""

    port: int = Field(default=9464, ge=1, le=65535)
    """First port tried for the metrics endpoint. The next free port is taken if it is busy."""
    address: str = "127.0.0.1"
    """Address that the metrics endpoint listens on."""
    every: Duration = Duration(10, "steps")
    """Interval of the lines in metrics.jsonl, in steps."""
    targets: str = "/tmp/detour/targets"
    """Directory in which runs announce their endpoints to Prometheus. The shipped prometheus.yml reads the default."""
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further destinations of the lines of metrics.jsonl. Each needs its own package."""

    @field_validator("every")
    @classmethod
    def _steps(cls, value: Duration) -> Duration:
        if value.unit != "steps" or value.value == 0:
            raise ValueError(f"the logging interval is a number of steps such as '10 steps', got '{value}'")
        return value
