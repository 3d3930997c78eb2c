"""Everything that a study can be refused for, checked before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.errors import InputError
from configs.units import format_count
from datapipe.inputs import find_inputs
from datapipe.notes import Notes
from studies.measures import Measure
from studies.plan import Study, Trial, decay_of, orders_of, settings_read


def require_held_out(study: Study, trials: Sequence[Trial]) -> None:
    """Require that every trial measures its loss on the same held-out text, which no trial trains on.

    Raises:
        InputError: The recipe names no held-out text, or text that is trained on.
    """
    for trial in trials:
        held_out = trial.config.data.evaluation
        if held_out is None:
            raise InputError(
                f"study {study.name}, trial {trial.name}: no held-out text, and training losses of arms cannot be "
                "compared; write held_out: {shards: DIRECTORY, text: FILES} into the study, or data.evaluation into "
                "the recipe",
                key="data.evaluation",
                code="no-held-out-text",
            )
        for source in trial.config.data.sources:
            shared = sorted(set(source.text) & set(held_out.text))
            same = source.reading == held_out.reading and shared
            if source.shards == held_out.shards or same:
                raise InputError(
                    f"study {study.name}, trial {trial.name}: data.evaluation: {(shared or [held_out.shards])[0]} is "
                    f"trained on by the source {source.name}; give text that no source has",
                    key="data.evaluation",
                    code="held-out-is-trained-on",
                )


def require_text(trials: Sequence[Trial]) -> None:
    """Require the local text or shards of every source and held-out set.

    Raises:
        InputError: There is no such text.
    """
    seen = set()
    for trial in trials:
        data = trial.config.data
        for key, source in [
            *((f"data.sources.{number}", source) for number, source in enumerate(data.sources)),
            *([("data.evaluation", data.evaluation.source)] if data.evaluation else []),
        ]:
            place = (source.shards, source.text)
            if place in seen or "://" in source.shards or _exists(source.shards):
                continue
            seen.add(place)
            if not source.text:
                raise InputError(
                    f"{key}.shards: no shards at {source.shards}; write them with detour prepare, or give {key}.text",
                    key=f"{key}.shards",
                    code="no-shards",
                )
            find_inputs(source.text, source.reading, Notes())


def plan_lines(study: Study, trials: Sequence[Trial], measures: Sequence[Measure]) -> list[str]:
    """State what a study will run, measure and decide."""
    orders, arms = len(orders_of(trials)), max(1, len(study.arms))
    held_out = trials[0].config.data.evaluation
    slots = sum(trial.config.spans[-1].tokens(trial.config.total_steps) for trial in trials)
    lines = [
        f"{len(trials)} trials: {arms} arms x {len(trials) // arms} grid points, {orders} orders; "
        f"{format_count(slots)} token slots in all, shared trunks counted per trial",
        f"Held-out MLM loss on {held_out.sequences:,} sequences of {held_out.shards}, at the end of every trial"
        if held_out
        else "",
        *(measure.sentence for measure in measures),
    ]
    settings = settings_read((trial.point, decay_of(trial)) for trial in trials)
    rule = study.rule.sentences(orders, arms - 1, settings) if study.rule else []
    return [line for line in lines if line] + rule


def _exists(shards: str) -> bool:
    path = Path(shards).expanduser()
    return path.exists() or any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
