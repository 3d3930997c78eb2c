"""The record beside a checkpoint's tensors: everything of a run that is not a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from configs.errors import InputError

FORMAT = 1
"""Layout of a checkpoint directory. A version of Detour reads its own number only."""


class CheckpointMeta(BaseModel):
    """The content of detour.json. Each field that a resume reads is a field that a save wrote.

    Fields of newer versions are ignored, so that their checkpoints of the same format load.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    """Completed steps."""
    architecture: dict[str, Any]
    """The model's Hugging Face configuration."""
    initial_architecture: dict[str, Any] | None = None
    """`architecture` as it was before phases changed the rotary base; None if no phase has."""
    optimizer: bool
    """Whether the optimizer's state is among the tensors."""
    files: dict[str, tuple[int, str]]
    """Size in bytes and sha256 of every other file of the directory."""
    source: str | None = None
    """Directory or hub id of the imported model; None in a run's checkpoint."""
    config: dict[str, Any] | None = None
    """The run's configuration; None outside a run."""
    phase: int | None = None
    """Index of the current phase, from 0."""
    data: dict[str, Any] | None = None
    """Position of every data stream of the run, by stream."""
    recorder: dict[str, Any] | None = None
    """`Recorder.state()`."""
    guards: dict[str, list[float]] | None = None
    """`Guards.state()`."""
    software: dict[str, str] | None = None
    """Versions of Detour and its packages that wrote a run's checkpoint."""
    micro_batches: dict[str, int] = {}
    """The choices of `batch.micro: auto`: packed sequences of a micro-batch, by `engine.micro_batch.identity`."""

    @model_validator(mode="before")
    @classmethod
    def _single_choice(cls, content: Any) -> Any:
        """Read the single choice (key, size) that older versions kept."""
        if isinstance(content, dict) and content.get("micro_batch"):
            key, size = content["micro_batch"]
            return {**content, "micro_batches": {key: size}}
        return content

    @model_validator(mode="after")
    def _require_run_fields(self) -> CheckpointMeta:
        missing = [name for name in ("phase", "data", "recorder", "guards") if getattr(self, name) is None]
        if self.config is not None and missing:
            raise ValueError(f"a run's checkpoint needs {', '.join(missing)}")
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, and the format, as JSON values."""
        fields = {name: value for name, value in self.model_dump().items() if value is not None}
        return {"format": FORMAT, **fields}

    @classmethod
    def from_json(cls, content: Any, path: Path) -> CheckpointMeta:
        """Read a detour.json.

        Args:
            content: The parsed file.
            path: The file, for messages.

        Raises:
            InputError: The format is another one, or a field is missing or of the wrong type.
        """
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT:
            raise InputError(
                f"{path.parent} has checkpoint format {version}; this version reads {FORMAT}", code="checkpoint-format"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            faults = "; ".join(".".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors())
            raise InputError(
                f"{path} is incomplete ({faults}); use an older checkpoint", code="checkpoint-damaged"
            ) from None
