"""`batch`: the batch sizes of the run."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from configs.schema.section import Section


class Batch(Section):
    """Batch sizes."""

    sequences: PositiveInt = 384
    """Packed sequences per global batch, over all data-parallel ranks."""
    micro: PositiveInt | Literal["auto"] = "auto"
    """Packed sequences per micro-batch on one data-parallel rank. `auto`: the largest that fits the GPU, which is
    measured at the start; a rule of thumb on a CPU."""
    recompute: Literal["none", "full"] = "none"
    """`full` keeps the input of each layer alone, and computes the layer again in the backward pass. The results are
    the same to the last digit. By formula a row takes about a tenth of the memory, and a step up to a third more
    time."""
