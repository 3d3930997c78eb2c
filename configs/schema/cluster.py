"""`cluster`: nodes, workers and survivable failures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from configs.schema.section import Section


class Cluster(Section):
    """Nodes and workers of the run, and the failures that it survives."""

    nodes: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Nodes of the Ray cluster; `--nodes` sets it. With [fewest, most] the run continues on fewer nodes and grows when
    more nodes come."""
    workers_per_node: PositiveInt | Literal["auto"] = "auto"
    """Workers per node. `auto`: one per GPU; without GPUs, tensor x pipeline."""
    gpus_per_node: NonNegativeInt | Literal["auto"] = "auto"
    """GPUs per node. `auto`: as many as the largest present node has. Give the number if the cluster starts its GPU
    nodes on demand, and let `start_timeout` cover their start."""
    start_timeout: PositiveInt = 120
    """Seconds that the run waits for its nodes."""
    hang_timeout: PositiveInt = 600
    """Seconds without a completed step after which the workers are restarted."""
    max_failures: int = Field(default=3, ge=0)
    """Worker failures that the run survives."""
    max_preemptions: int = Field(default=100, ge=0)
    """Preemptions with notice, which lose no step, that the run survives. It then stops with everything saved."""
    grow_every: int = Field(default=300, ge=0)
    """Fewest seconds between two growths of a run with [fewest, most] nodes, because each costs a restart."""

    @field_validator("nodes")
    @classmethod
    def _fewest_first(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"a range of nodes is [fewest, most], got {list(value)}")
        return value
