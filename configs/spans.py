"""The phases of a run laid out on its steps, each with its own data and batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.units import Duration

if TYPE_CHECKING:
    from configs.schema import Batch, Data, Phase


@dataclass(frozen=True)
class PhaseSpan:
    """A phase and the steps it covers, with every inherited setting filled in."""

    index: int
    phase: Phase
    first: int
    """0-based step at which it starts."""
    last: int
    """The step after its end."""
    first_token: int
    """Token slots of the steps before it, padding included."""
    run_data: Data
    """The data section of the run."""
    sequences: int
    """Packed sequences per global batch."""

    @property
    def sequence_length(self) -> int:
        """Tokens per packed sequence."""
        return self.phase.sequence_length or self.run_data.sequence_length

    @property
    def data(self) -> Data:
        """The data section with the phase's sequence length, sources and weights."""
        own: dict[str, object] = {"sequence_length": self.sequence_length}
        if self.phase.sources is not None:
            own["sources"] = tuple(
                source.model_copy(update={"weight": self.phase.sources[source.name], "upsample": None})
                for source in self.run_data.sources
                if source.name in self.phase.sources
            )
        return self.run_data.model_copy(update=own)

    @property
    def steps(self) -> int:
        """Optimizer steps of the phase."""
        return self.last - self.first

    @property
    def tokens_per_step(self) -> int:
        """Token slots per global batch, padding included: sequences x sequence length."""
        return self.sequences * self.sequence_length

    def tokens(self, step: int) -> int:
        """Token slots of the run's first `step` steps, of which the last one lies in this phase."""
        return self.first_token + (step - self.first) * self.tokens_per_step

    def is_due(self, every: Duration, step: int, seconds_since_last: float = 0.0) -> bool:
        """Return whether an action at this interval is due after `step` steps, of which the last is of this phase."""
        return every.is_due(step, self.tokens(step), self.tokens_per_step, seconds_since_last)


def phase_spans(phases: Sequence[Phase], data: Data, batch: Batch) -> tuple[PhaseSpan, ...]:
    """Lay the phases out on the steps of the run."""
    spans: list[PhaseSpan] = []
    first = first_token = 0
    for index, phase in enumerate(phases):
        sequences = phase.batch.sequences or batch.sequences
        last = first + phase.length(sequences * (phase.sequence_length or data.sequence_length))
        spans.append(PhaseSpan(index, phase, first, last, first_token, data, sequences))
        first, first_token = last, spans[-1].tokens(last)
    return tuple(spans)
