"""Training objectives: how attention looks, what the model reads and predicts, and where it pays loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

from configs.schema import Phase
from datapipe.targets import Masked, NextToken
from datapipe.tokenizer import Tokenizer


class Objective(ABC):
    """One way to train on packed documents."""

    name: str
    causal: bool
    """Whether a token sees only what stands before it in its document."""

    @abstractmethod
    def targets(self) -> NextToken | Masked:
        """How inputs and labels are made from a packed sequence, as a pure function of it."""


class CausalLM(Objective):
    """Next-token prediction at every position but the last of each document."""

    name = "clm"
    causal = True

    def targets(self) -> NextToken:
        return NextToken()


class MaskedLM(Objective):
    """Prediction of masked tokens from both sides."""

    name = "mlm"
    causal = False

    def __init__(self, phase: Phase, tokenizer: Tokenizer, seed: int) -> None:
        self.phase, self.tokenizer, self.seed = phase, tokenizer, seed

    def targets(self) -> Masked:
        return Masked(
            rate=self.phase.mask_rate,
            split=self.phase.mask_split,
            seed=self.seed,
            mask_id=self.tokenizer.mask_id,
            vocab_size=self.tokenizer.vocab_size,
            special_ids=self.tokenizer.special_ids,
        )


def objective_of(phase: Phase, tokenizer: Tokenizer, seed: int) -> Objective:
    return CausalLM() if phase.objective == "clm" else MaskedLM(phase, tokenizer, seed)
