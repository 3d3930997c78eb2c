"""`optimizer`: AdamW."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, field_validator

from configs.schema.section import Section


class Optimizer(Section):
    """AdamW."""

    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-6
    """Constant added to the root of the second moment."""
    weight_decay: float = Field(default=1e-5, ge=0.0)
    """Weight decay. Biases and norm weights have no decay."""
    decoupled: bool = True
    """`true`: a step decays by weight_decay * lr / peak lr. `false`: by weight_decay * lr, as torch's AdamW does."""
    clip: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm. 0 turns clipping off."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas lie in [0, 1), got {list(value)}")
        return value
