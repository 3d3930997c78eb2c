"""Remarks on a study's page: the look at the spread, the models before their training, and leakage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_json
from configs.schema import SCRATCH
from studies.decision import spread_of
from studies.evaluate import Parallel, digest_of, said_of_leakage
from studies.leakage import Corpora, leakage, name_of, size_of
from studies.measures import Measure
from studies.plan import Study, Trial


def look_at_spread(study: Study, records: Sequence[dict[str, Any]], output: Path) -> tuple[bool, str]:
    """Look at the spread of the first orders, once; return whether the study stops, and the sentence for the page."""
    assert study.rule is not None
    path = output / "look.json"
    if not path.exists():
        spread = spread_of(records, study.rule, study.baseline or next(iter(study.arms)))
        write_json(path, {"orders": study.rule.look_after, "spread": spread, "largest": study.rule.largest_spread})
    look = json.loads(path.read_text(encoding="utf-8"))
    stops = look["spread"] > look["largest"]
    return stops, (
        f"Look after {look['orders']} orders, at the spread only: the differences vary by {100 * look['spread']:.2f} "
        f"points, {'more than' if stops else 'at most'} {100 * look['largest']:g}; "
        f"the study {'stops here and is published as it is' if stops else 'goes on'}."
    )


def before_training(
    trials: Sequence[Trial], measures: Sequence[Measure], output: Path, parallel: Parallel
) -> list[str]:
    """Measure what the models knew of general text before their training; return a line per model and task."""
    lines = []
    inits = dict.fromkeys(trial.config.model.init for trial in trials)
    for measure in measures:
        for init in (name for name in inits if measure.splits is None and name != SCRATCH):
            path = output / "before" / f"{hashlib.sha256(f'{init} {measure.address}'.encode()).hexdigest()[:10]}.json"
            try:
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, measure.take(init, path.with_suffix(""), parallel))
                [score] = json.loads(path.read_text(encoding="utf-8")).values()
                lines.append(f"{measure.label}, before training: {100 * score:.2f} % masked accuracy of {init}")
            except InputError as error:
                lines.append(f"{measure.label}, before training: not measured for {init}: {error}")
    return lines


def leakage_lines(trials: Sequence[Trial], measures: Sequence[Measure], output: Path) -> list[str]:
    """Search the training text of all trials for the test examples of each task, once per text and task."""
    lines = []
    corpora = Corpora()
    for trial in trials:
        corpora.add_run(trial.name, trial.config)
    text = [[name_of(file), size_of(file), str(how)] for file, how in corpora.files.items()]
    for measure in measures:
        if measure.splits is None:
            continue
        content = json.dumps([text, corpora.unseen, digest_of(measure.splits)])
        path = output / "leakage" / f"{hashlib.sha256(content.encode()).hexdigest()[:10]}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, leakage(measure.splits.test, corpora))
        found = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"{measure.task.name}: {line}" for line in (*measure.splits.notes, *said_of_leakage(found))]
    return list(dict.fromkeys(lines))
