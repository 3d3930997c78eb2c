"""`detour audit`: what runs memorised of the canaries in their training text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.errors import InputError
from configs.files import write_json
from configs.load import load_config
from configs.schema import RunConfig
from datapipe.canaries import Canaries, Canary, candidates
from engine.checkpoint_meta import CheckpointMeta
from engine.model_card import has_trained_masks, refresh_card
from engine.run_inputs import run_canaries, run_tokenizer
from monitoring.audit import copies_title, exposure_cell
from monitoring.report import write_report
from monitoring.run_directory import RunDirectory
from monitoring.run_files import require_run
from studies.exposure import Attack, Encoded, chance, encode, exposures, score
from studies.intervals import mean_interval
from studies.models import silence_transformers

DOUBTFUL = 3.3
"""Standard errors by which the controls may differ from chance: one sound audit in a thousand exceeds them."""
Row = dict[str, Any]
"""One checkpoint under one attack."""
Progress = Callable[[str], None]


def audit(
    runs: Sequence[Path], *, checkpoint: int | None = None, count: int = 1023, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure the exposure of each canary, write audit.json of each run, and renew its report and model card.

    Args:
        runs: Run directories. The others are compared with the first.
        checkpoint: Step of the only checkpoint to audit; None for the end of each phase and the newest.
        count: Candidates among which a secret is ranked.
        progress: Receives progress lines.

    Returns:
        `runs` with the content of each audit.json, `differences` of the newest checkpoints of each run and the first,
        and `notes` about runs that cannot be compared.

    Raises:
        InputError: A run has no canaries, or no checkpoint that can be read.
    """
    silence_transformers()
    for run in runs:  # all of them before the first is scored, because that may take long
        run_canaries(load_config(str(require_run(run).config)), run)
    results = [_audit_run(run, checkpoint, count, progress) for run in runs]
    differences, notes = [], []
    for other in results[1:]:
        if other["canaries_id"] != results[0]["canaries_id"]:
            notes.append(
                f"{other['run']} has other canaries than {results[0]['run']}, so they are not compared in pairs"
            )
            continue
        differences += _differences(results[0], other)
    return {"runs": results, "differences": differences, "notes": notes}


def print_audit(result: Mapping[str, Any], console: Console) -> None:
    """Print the exposures of each run, and the differences between runs."""
    for run in result["runs"]:
        copies = [group["copies"] for group in run["rows"][0]["groups"]]
        table = Table("after", "attack", *map(copies_title, copies), title=f"{run['run']}: exposure in bits")
        for row in run["rows"]:
            cells = (f"{exposure_cell(group)}, {group['first']}/{group['canaries']} first" for group in row["groups"])
            table.add_row(f"step {row['step']:,} ({row['phase']})", row["objective"].upper(), *cells)
        console.print(table)
        read = dict.fromkeys(f"step {row['step']:,}: {_passes(row)}" for row in run["rows"])
        _say(console, [*read, _meaning(run), *run["notes"]])
    for difference in result["differences"]:
        copies = [group["copies"] for group in difference["groups"]]
        table = Table(
            "attack", *map(copies_title, copies), title=f"{difference['run']} minus {difference['first']}, bits"
        )
        table.add_row(difference["objective"].upper(), *(exposure_cell(group) for group in difference["groups"]))
        console.print(table)
    _say(console, result["notes"])


def _say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _meaning(run: Mapping[str, Any]) -> str:
    return (
        f"exposure of a secret that was never seen: {run['expected_bits']:.2f} bits on average; most that "
        f"{run['candidates']:,} candidates can show: {run['ceiling_bits']:.2f} bits (--candidates); first: canaries "
        "that the model prefers to all candidates"
    )


def _passes(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{passes:.2f} passes over {source}" for source, passes in row["passes"].items())


def _audit_run(directory: Path, checkpoint: int | None, count: int, progress: Progress | None) -> dict[str, Any]:
    files = require_run(directory)
    config = load_config(str(files.config))
    by_source = run_canaries(config, directory)
    canaries = _merged(by_source)
    first = next(iter(by_source.values()))
    tokenizer = run_tokenizer(config, directory)
    encoded = encode([*canaries, *candidates(first.seed, count, len(first.planted))], tokenizer)
    mean, deviation = chance(count)
    audited: dict[str, Any] = {
        "run": str(directory),
        "canaries_id": " ".join(sorted(one.seed for one in by_source.values())),
        "candidates": count,
        "expected_bits": mean,
        "ceiling_bits": math.log2(count + 1),
        "notes": [],
        "rows": [],
    }
    chosen, notes = _checkpoints(directory, config, checkpoint)
    audited["notes"] += notes
    for path in chosen:
        try:
            audited["rows"] += _audit_checkpoint(path, config, by_source, canaries, encoded, progress)
        except InputError as error:
            if error.code != "checkpoint-damaged":
                raise
            audited["notes"].append(f"{path.name} is left out: {error}.")
    if not audited["rows"]:
        reasons = " ".join(audited["notes"]) or "no step is trained yet."
        raise InputError(
            f"{directory}: no checkpoint can be audited: {reasons} Train the run, or give another --checkpoint",
            key="--checkpoint",
            code="no-checkpoint",
        )
    for row in audited["rows"]:
        controls = row["groups"][0]
        limit = DOUBTFUL * deviation / math.sqrt(controls["canaries"])
        if abs(controls["mean"] - mean) > limit:
            audited["notes"].append(
                f"The controls of step {row['step']:,} ({row['objective'].upper()}) are at {controls['mean']:.2f} "
                f"bits, further from {mean:.2f} than chance explains, so do not rely on this row."
            )
    if checkpoint is not None:
        audited["rows"] = _with_earlier(files.audit, audited)
    write_json(files.audit, audited)
    if files.report.exists():
        write_report(directory)
    refresh_card(files.export, directory)
    return audited


def _merged(by_source: Mapping[str, Canaries]) -> list[Canary]:
    """The controls, then the canaries by number of copies; those of sources with equal text count together."""
    copies: Counter[str] = Counter()
    distinct: dict[str, Canary] = {}
    for canaries in by_source.values():
        for canary in canaries.canaries:
            distinct[canary.text] = canary
            copies[canary.text] += canary.copies
    return sorted((replace(one, copies=copies[text]) for text, one in distinct.items()), key=lambda one: one.copies)


def _checkpoints(directory: Path, config: RunConfig, step: int | None) -> tuple[list[Path], list[str]]:
    """Choose checkpoints, oldest first, and tell which ends of phases are lost."""
    from engine.checkpoint import list_checkpoints, step_of

    by_step = {step_of(path): path for path in reversed(list_checkpoints(RunDirectory(directory).checkpoints))}
    if step is not None:
        if step not in by_step:
            there = ", ".join(f"{one:,}" for one in by_step) or "none"
            raise InputError(
                f"{directory} has no checkpoint of step {step:,}; there are {there}",
                key="--checkpoint",
                code="no-such-checkpoint",
            )
        return [by_step[step]], []
    newest = max(by_step, default=0)
    ends = {span.last: span.phase.objective_name.upper() for span in config.spans if span.last <= newest}
    lost = [
        f"The checkpoint at the end of {name}, step {end:,}, is lost."
        for end, name in ends.items()
        if end not in by_step
    ]
    return [by_step[one] for one in sorted({*ends, newest} & by_step.keys())], lost


def _audit_checkpoint(
    checkpoint: Path,
    config: RunConfig,
    by_source: Mapping[str, Canaries],
    canaries: Sequence[Canary],
    encoded: Sequence[Encoded],
    progress: Progress | None,
) -> list[Row]:
    """A row per attack that the checkpoint's training makes sensible."""
    from datapipe.tokenizer import load_tokenizer
    from engine.checkpoint import describe
    from engine.export import export_hf

    meta = describe(checkpoint)
    span = config.span_at(meta.step)
    begun = {name for one in config.spans if one.first < meta.step for name in one.phase.objectives}
    sensible: dict[Attack, bool] = {"clm": "clm" in begun, "mlm": has_trained_masks(meta)}
    tokenizer = load_tokenizer(str(checkpoint))
    rows = []
    for attack in (attack for attack, is_sensible in sensible.items() if is_sensible):
        show = None if progress is None else lambda line: progress(f"{checkpoint.name}, {line}")
        with TemporaryDirectory(prefix="detour-") as folder:
            export_hf(checkpoint, Path(folder), tokenizer, kind="decoder" if attack == "clm" else "encoder")
            scores = score(Path(folder), attack, encoded, tokenizer, show)
        exposed = exposures(scores[: len(canaries)], scores[len(canaries) :])
        by_copies = groupby(zip(canaries, exposed, strict=True), key=lambda pair: pair[0].copies)
        values = {copies: [float(value) for _, value in pairs] for copies, pairs in by_copies}
        ceiling = math.log2(len(encoded) - len(canaries) + 1)
        rows.append(
            {
                "checkpoint": checkpoint.name,
                "step": meta.step,
                "phase": f"{'end of' if meta.step == span.last else 'in'} {span.phase.objective_name.upper()}",
                "objective": attack,
                "passes": {name: _passes_over(name, one, meta) for name, one in by_source.items()},
                "groups": [_group(copies, some, ceiling) for copies, some in values.items()],
                "exposures": {str(copies): some for copies, some in values.items()},
            }
        )
    return rows


def _group(copies: int, values: Sequence[float], ceiling: float) -> Row:
    """Mean exposure of the canaries with so many copies, and its interval, within what ranks can show."""
    interval = mean_interval(values).as_row()
    low, high = (None if end is None else min(max(end, 0.0), ceiling) for end in (interval["low"], interval["high"]))
    first = int(np.sum(np.array(values) == ceiling))
    return {
        "copies": copies,
        "canaries": len(values),
        "mean": interval["mean"],
        "low": low,
        "high": high,
        "first": first,
    }


def _passes_over(source: str, canaries: Canaries, meta: CheckpointMeta) -> float:
    """Passes over a source, by the documents that all streams have drawn."""
    drawn = 0
    for stream in (meta.data or {}).values():
        cursor = stream["sources"].get(source) or stream.get("idle", {}).get(source, {}).get("cursor")
        drawn += cursor["documents"] if cursor else 0
    return drawn / canaries.documents


def _with_earlier(path: Path, audited: Mapping[str, Any]) -> list[Row]:
    """Rows of other steps that an earlier audit measured in the same way, and those of this one."""
    try:
        before = json.loads(path.read_bytes())
        is_alike = all(before[key] == audited[key] for key in ("canaries_id", "candidates"))
        rows: list[Row] = before["rows"] if is_alike else []
        steps = {row["step"] for row in audited["rows"]}
        return sorted(
            [*(row for row in rows if row["step"] not in steps), *audited["rows"]], key=lambda row: row["step"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return list(audited["rows"])


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[Row]:
    """Paired differences of exposure between the newest audited checkpoints of two runs, per attack."""
    newest = [{row["objective"]: row for row in run["rows"]} for run in (first, other)]
    rows = []
    for objective in (name for name in newest[0] if name in newest[1]):
        a, b = (run[objective] for run in newest)
        groups = []
        for copies, before in a["exposures"].items():
            pairs = [y - x for x, y in zip(before, b["exposures"][copies], strict=True)]
            groups.append({"copies": int(copies), "canaries": len(pairs), **mean_interval(pairs).as_row()})
        rows.append(
            {
                "first": first["run"],
                "run": other["run"],
                "objective": objective,
                "steps": [a["step"], b["step"]],
                "groups": groups,
            }
        )
    return rows
