"""The whole recipe: the keys at its top level, and its sections."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from configs.schema.batch import Batch
from configs.schema.checkpoint import Checkpoint
from configs.schema.cluster import Cluster
from configs.schema.data import Data
from configs.schema.model import SCRATCH, Model
from configs.schema.monitoring import Monitoring
from configs.schema.optimizer import Optimizer
from configs.schema.parallel import Parallel
from configs.schema.phase import Phase
from configs.schema.rules import faults_between_sections
from configs.schema.section import Section
from configs.spans import PhaseSpan, phase_spans

BETWEEN_SECTIONS = "between-sections"
"""The type of the pydantic error whose context has a key and a reason for each of the `faults` between sections."""


class Origin(Section):
    """The run and the step that this run branched off at."""

    run: str
    """Directory of the other run."""
    step: PositiveInt
    """Completed steps of the checkpoint that this run started from."""


def _tokenizer_is_optional(schema: dict[str, Any]) -> None:
    schema["required"].remove("tokenizer")


class RunConfig(Section):
    """One run: a model, its data, and the phases that it is trained through."""

    model_config = ConfigDict(json_schema_extra=_tokenizer_is_optional)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run. The run directory is `runs/NAME` unless `--output` says otherwise."""
    seed: int = Field(default=17, ge=0)
    """Seed of the initial weights."""
    origin: Origin | None = None
    """Run and step that this run branches off at. It continues with that run's optimizer, data position and counters.
    `--from` sets it. Without a value the run starts at step 0."""
    model: Model
    """Initial weights and architecture."""
    tokenizer: str
    """Directory with a tokenizer.json, a hub id, or `package://tokenizer/modernbert` for the shipped tokenizer. Without
    a value: that of `model.init`. With `init: scratch` it is required."""
    data: Data
    """Training data."""
    batch: Batch = Batch()
    """Batch sizes."""
    phases: tuple[Phase, ...] = Field(min_length=1)
    """Phases in their order."""
    optimizer: Optimizer = Optimizer()
    """AdamW."""
    parallel: Parallel = Parallel()
    """Layout of the model over workers."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Number format. `auto` is BF16 if the hardware multiplies it faster than FP32. It is FP8 where FP8 was measured to
    be faster still: on Hopper GPUs, from a billion parameters on, without tensor parallelism. The first lines of a run
    name the choice."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """Scaling of FP8 numbers. `delayed` scales by a history, which checkpoints hold."""
    attention: Literal["torch", "transformer_engine", "flash_attn_4"] = "transformer_engine"
    """Kernels of global attention on a GPU in half precision. `torch`: FlashAttention for packed documents.
    `transformer_engine`: the kernels that Transformer Engine chooses, which are faster. `flash_attn_4`: those of the
    package flash-attn-4, on Hopper GPUs or later; they were not measured."""
    deterministic: bool = False
    """Add up a GPU's gradients in a fixed order, so that repeated and resumed runs are equal bit for bit. CPUs always
    do. It is slower. `attention: transformer_engine` is then `torch`, because it has no such kernel for long rows."""
    fp8_bf16_edges: bool = False
    """Keep the first and the last layer in BF16. Not available with `fp8_recipe: delayed`."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints."""
    cluster: Cluster = Cluster()
    """Nodes and workers."""
    monitoring: Monitoring = Monitoring()
    """Metrics endpoint and logs."""

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_model(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("tokenizer") is not None or not isinstance(tree.get("model"), dict):
            return tree
        rest = {key: value for key, value in tree.items() if key != "tokenizer"}
        init = tree["model"].get("init", SCRATCH)
        if init == SCRATCH:
            return rest
        return {"tokenizer": init if isinstance(init, str) else "unknown", **rest}  # another type is a fault of `init`

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if faults := faults_between_sections(self):
            raise PydanticCustomError(BETWEEN_SECTIONS, "the sections of the recipe disagree", {"faults": faults})
        return self

    @property
    def spans(self) -> tuple[PhaseSpan, ...]:
        """The phases laid out on the steps of the run."""
        return phase_spans(self.phases, self.data, self.batch)

    def span_at(self, step: int) -> PhaseSpan:
        """Return the phase of the last of the first `step` steps; the first phase for 0."""
        return next(span for span in self.spans if step <= span.last)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases."""
        return self.spans[-1].last
