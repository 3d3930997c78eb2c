"""Training objectives: inputs and labels, the positions that carry a loss, and mixtures."""

from __future__ import annotations

from abc import ABC, abstractmethod

from configs.schema import Phase
from configs.spans import PhaseSpan
from datapipe.targets import Masked, Mixed, NextToken, Targets
from datapipe.tokenizer import Tokenizer
from datapipe.words import word_starts


class Objective(ABC):
    """A way to train on packed documents."""

    name: str

    @abstractmethod
    def targets(self) -> Targets | Mixed:
        """Return the rule that makes inputs and labels from a packed sequence, as a pure function of it."""


class CausalLM(Objective):
    """Next-token prediction at every position but the last of each document."""

    name = "clm"

    def targets(self) -> NextToken:
        """Return next-token targets."""
        return NextToken()


class MaskedLM(Objective):
    """Prediction of masked tokens from both sides."""

    name = "mlm"

    def __init__(self, phase: Phase, tokenizer: Tokenizer, seed: int, steps: tuple[int, int] = (0, 1)) -> None:
        self.phase, self.tokenizer, self.seed, self.steps = phase, tokenizer, seed, steps

    def targets(self) -> Masked:
        """Return masked-token targets, by the phase's rates."""
        rates = self.phase.mask_rate
        first, last = rates if isinstance(rates, tuple) else (rates, None)
        return Masked(
            rate=first,
            final_rate=last,
            steps=self.steps,
            split=self.phase.mask_split,
            seed=self.seed,
            mask_id=self.tokenizer.mask_id,
            vocab_size=self.tokenizer.vocab_size,
            special_ids=self.tokenizer.special_ids,
            starts_word=word_starts(self.tokenizer) if self.phase.mask_unit == "word" else None,
        )


class MixedObjective(Objective):
    """CLM and MLM in one phase; each packed sequence has one of them."""

    def __init__(self, phase: Phase, masked: MaskedLM) -> None:
        self.name = phase.objective_name
        self.phase, self.masked = phase, masked

    def targets(self) -> Mixed:
        """Return the targets of each objective, and the shares by which a row draws one."""
        masked = self.masked.targets()
        targets = tuple(NextToken() if name == "clm" else masked for name in self.phase.objectives)
        return Mixed(targets, tuple(self.phase.objectives.values()), self.masked.seed)


def objective_of(span: PhaseSpan, tokenizer: Tokenizer, seed: int) -> Objective:
    """Return the objective that a phase names."""
    masked = MaskedLM(span.phase, tokenizer, seed, (span.first, span.last))
    if isinstance(span.phase.objective, dict):
        return MixedObjective(span.phase, masked)
    return CausalLM() if span.phase.objective == "clm" else masked
