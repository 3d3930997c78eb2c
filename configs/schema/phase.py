"""`phases`: objective, length, learning rate, batch and masks of each phase."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from configs.schema.section import Section
from configs.units import Count, Duration


def _part(value: Any) -> Any:
    if value in ("embeddings", "head") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(f"give numbers of layers from 0, embeddings or head, got {value!r}")


Part = Annotated[int | str, BeforeValidator(_part)]
"""A part of the model: the number of a layer, `embeddings` or `head`."""


def _number(value: Any) -> Any:
    """Return the number that a text such as 0.3 holds, which environment variables give; else the value."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _rates(value: Any) -> Any:
    value = [_number(rate) for rate in value] if isinstance(value, list | tuple) else _number(value)
    rates = [value] if isinstance(value, int | float) else value
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if (is_pair or rates is not value) and all(isinstance(rate, int | float) and 0 < rate < 1 for rate in rates):
        return value
    raise ValueError(f"give a share above 0 and below 1, or two such as [0.3, 0.15], got {value!r}")


ObjectiveName = Literal["clm", "mlm"]


def _objective(value: Any) -> Any:
    names = get_args(ObjectiveName)
    if isinstance(value, str) and value in names:
        return value
    if isinstance(value, dict) and set(value) == set(names):
        odds = [odd for odd in map(_number, value.values()) if isinstance(odd, int | float) and 0 < odd < math.inf]
        if len(odds) == len(names):
            return value
    raise ValueError(f"give clm or mlm, or odds above 0 for both such as {{clm: 1, mlm: 15}}, got {value!r}")


class LearningRate(Section):
    """Learning-rate schedule of one phase. It restarts at the phase's first step."""

    peak: PositiveFloat | None = None
    """Peak learning rate of the phase. Without a value: `optimizer.lr`."""
    warmup: Duration = Duration(0, "tokens")
    """Linear warmup from zero, in tokens or steps."""
    shape: Literal["constant", "linear", "cosine", "1-sqrt"] = "constant"
    """Decay from the end of the warmup to the phase's last step."""
    final: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the peak that the decay reaches. Unused by a constant shape."""

    @model_validator(mode="after")
    def _steps_only(self) -> Self:
        if self.warmup.unit == "minutes":
            raise ValueError(
                "warmup is given in tokens or steps: minutes would make the schedule depend on the machine"
            )
        return self


class PhaseBatch(Section):
    """Batch sizes of one phase. A key without a value keeps that of the run's `batch`."""

    sequences: PositiveInt | None = None
    """Packed sequences per global batch, over all data-parallel ranks. A multiple of `data.streams`."""
    micro: PositiveInt | Literal["auto"] | None = None
    """Packed sequences per micro-batch on one data-parallel rank. `auto` is fitted per sequence length."""


class Phase(Section):
    """A stretch of training with one objective or a mixture. Weights and optimizer state pass unchanged to the next."""

    objective: Annotated[ObjectiveName | dict[ObjectiveName, float], BeforeValidator(_objective)]
    """`clm`: causal language modelling. `mlm`: masked language modelling. Odds such as `{clm: 1, mlm: 15}`: each packed
    sequence has one of the two, drawn by a hash of the data seed and its place. Every label position weighs the same in
    the loss, and a causal sequence has more of them."""
    tokens: Count | None = None
    """Length in tokens, padding included (sequences x sequence length per step), rounded to a step."""
    steps: PositiveInt | None = None
    """Length in steps. A phase has either `tokens` or `steps`."""
    sources: dict[str, PositiveFloat] | None = None
    """Weights of the sources that the phase draws from, by name. A source left out keeps its position in its text and
    continues from there in a later phase. Without a value: all of `data.sources`, by their own weights."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens per packed sequence. Without a value: `data.sequence_length`. The evaluation set keeps that one."""
    global_rope_theta: PositiveFloat | None = None
    """Base of the rotary embeddings in layers with global attention, from the phase's first step on. Without a value it
    stays as it is."""
    batch: PhaseBatch = PhaseBatch()
    """Batch sizes."""
    lr: LearningRate = LearningRate()
    """Learning-rate schedule."""
    mask_rate: Annotated[float | tuple[float, float], BeforeValidator(_rates)] = 0.15
    """Share of the maskable tokens that MLM predicts. Two shares: those of the first and of the last step, with a
    straight line between them."""
    mask_split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the predicted tokens that become the mask token, become a random token, and stay."""
    mask_unit: Literal["token", "word"] = "token"
    """`word`: the tokens of a word are predicted all or none. Spaces separate words, so `word` does not suit languages
    without spaces; a WordPiece tokenizer says itself where words begin. `mask_split` draws for each token, as BERT's
    whole-word masking does."""
    freeze: tuple[Part, ...] = ()
    """Parts whose weights and Adam moments do not change in this phase: numbers of layers, from 0, `embeddings` and
    `head`. `embeddings` are the token embeddings and their norm. The decoder's matrix is the token embeddings, so it
    stands still too. `head` is the prediction head: its dense layer, its norm and the decoder's bias."""
    reset: tuple[Literal["head"], ...] = ()
    """`head` gives the prediction head new weights and zero moments before the first step of this phase. Its dense
    layer becomes random, its norm 1 and the decoder's bias 0. Default: the head is kept, as the optimizer's state is,
    because one head serves both objectives."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError(
                "has both tokens and steps: remove one, on the command line by KEY=null"
                if self.steps
                else "has no length: give tokens or steps"
            )
        if self.tokens == 0:
            raise ValueError("tokens must be greater than 0")
        if min(self.mask_split) < 0 or abs(sum(self.mask_split) - 1) > 1e-9:
            raise ValueError(f"mask_split needs three shares that add up to 1, got {list(self.mask_split)}")
        if len(set(self.freeze)) < len(self.freeze):
            raise ValueError(f"freeze names each part once, got {list(self.freeze)}")
        if "head" in self.freeze and "head" in self.reset:
            raise ValueError("freeze and reset both name the head: a new head must train; remove it from one of them")
        return self

    @property
    def objectives(self) -> dict[ObjectiveName, float]:
        """Share of the packed sequences that each objective has, in the order clm, mlm; the shares add up to 1."""
        if isinstance(self.objective, str):
            return {self.objective: 1.0}
        total = sum(self.objective.values())
        return {name: self.objective[name] / total for name in sorted(self.objective)}

    @property
    def objective_name(self) -> str:
        """Name in logs and metrics: `clm`, `mlm`, or `clm+mlm` for a mixture."""
        return "+".join(self.objectives)

    def length(self, tokens_per_step: int) -> int:
        """Return the optimizer steps of this phase, at least one."""
        return self.steps or max(1, round((self.tokens or 0) / tokens_per_step))
