"""`parallel`: the layout of the model over workers."""

from __future__ import annotations

from typing import Self

from pydantic import PositiveInt, model_validator

from configs.schema.section import Section


class Parallel(Section):
    """Layout of the model over workers. The data-parallel size is workers / (tensor x pipeline)."""

    tensor: PositiveInt = 1
    """Tensor-parallel size."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""
    sequence: bool = False
    """Sequence parallelism: activations between tensor-parallel regions are split along the tokens."""

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence parallel splits activations over tensor-parallel ranks: set tensor to 2 or more")
        return self
