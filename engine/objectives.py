"""Training objectives: the direction of attention, inputs and labels, and the positions that carry a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

from configs.schema import Phase
from datapipe.targets import Masked, NextToken
from datapipe.tokenizer import Tokenizer


class Objective(ABC):
    """A way to train on packed documents."""

    name: str
    causal: bool
    """Whether a token sees only the tokens before it in its document."""

    @abstractmethod
    def targets(self) -> NextToken | Masked:
        """Return the rule that makes inputs and labels from a packed sequence, as a pure function of it."""


class CausalLM(Objective):
    """Next-token prediction at every position but the last of each document."""

    name = "clm"
    causal = True

    def targets(self) -> NextToken:
        """Return next-token targets."""
        return NextToken()


class MaskedLM(Objective):
    """Prediction of masked tokens from both sides."""

    name = "mlm"
    causal = False

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
        )


def objective_of(phase: Phase, tokenizer: Tokenizer, seed: int) -> Objective:
    """Return the objective that a phase names."""
    return CausalLM() if phase.objective == "clm" else MaskedLM(phase, tokenizer, seed)
