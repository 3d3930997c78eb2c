"""Training objectives: inputs and labels, the positions that carry a loss, and mixtures."""

from __future__ import annotations

from abc import ABC, abstractmethod

from configs.schema import Phase
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

    def __init__(self, phase: Phase, tokenizer: Tokenizer, seed: int) -> None:
        self.phase, self.tokenizer, self.seed = phase, tokenizer, seed

    def targets(self) -> Masked:
        """Return masked-token targets, by the phase's rates."""
        return Masked(
            rate=self.phase.mask_rate,
            split=self.phase.mask_split,
            seed=self.seed,
            mask_id=self.tokenizer.mask_id,
            vocab_size=self.tokenizer.vocab_size,
            special_ids=self.tokenizer.special_ids,
            starts_word=word_starts(self.tokenizer) if self.phase.mask_unit == "word" else None,
        )


class MixedObjective(Objective):
    """CLM and MLM in one phase; each packed sequence has one of them."""

    def __init__(self, phase: Phase, tokenizer: Tokenizer, seed: int) -> None:
        self.name = phase.objective_name
        self.phase, self.tokenizer, self.seed = phase, tokenizer, seed

    def targets(self) -> Mixed:
        """Return the targets of each objective, and the shares by which a row draws one."""
        masked = MaskedLM(self.phase, self.tokenizer, self.seed).targets()
        by_name: dict[str, Targets] = {"clm": NextToken(), "mlm": masked}
        targets = tuple(by_name[name] for name in self.phase.objectives)
        return Mixed(targets, tuple(self.phase.objectives.values()), self.seed)


def objective_of(phase: Phase, tokenizer: Tokenizer, seed: int) -> Objective:
    """Return the objective that a phase names."""
    if isinstance(phase.objective, dict):
        return MixedObjective(phase, tokenizer, seed)
    return CausalLM() if phase.objective == "clm" else MaskedLM(phase, tokenizer, seed)
