"""The report of a study: tables as JSON and CSV, and one HTML page with its charts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import InputError
from configs.files import write_atomically, write_json
from configs.units import format_count
from monitoring.charts import WIDE, Line, line_chart
from monitoring.page import Figure, render
from studies.comparison import cells_of, difference_charts, scale_of, slope_figures, slopes
from studies.decision import decide, loss_rows
from studies.differences import Record, differences, measures, order, value
from studies.plan import Study, dump_study, settings_read
from studies.provenance import made_rows, score_rows
from studies.scaling_law import Optimum, PowerLaw, fit, frontier
from studies.tables import finite, write_csv, write_tables

REPORT = "report.html"
CURVE_POINTS = 40
"""Points that a law is drawn with."""


def write_report(
    study: Study,
    records: Sequence[Record],
    output: Path,
    notes: Sequence[str] = (),
    measured: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write report.html, and the tables of decision, comparison, trials and measures as CSV, Markdown and LaTeX.

    comparison.json, decision.json, scaling.json and gains.json hold full numbers, scores.csv one row per seed, and
    speed.csv the speeds.

    The configuration and the seeds determine all files but speed.csv, and all of the page but its section on speed.

    Args:
        study: The study.
        records: One record per trial, in the order of the trials.
        output: Existing folder.
        notes: Lines about the tasks and the leakage, for the page.
        measured: `Measure.row` of each measure.

    Returns:
        The path of the page.
    """
    baseline = study.baseline or next(iter(study.arms), None)
    compared = differences(records, baseline) if baseline else []
    by_arm: dict[str | None, list[Record]] = defaultdict(list)
    for record in records:
        by_arm[record["arm"]].append(record)
    fitted = {arm: [record for record in group if math.isfinite(record["loss"])] for arm, group in by_arm.items()}
    left_out = {arm: [row["trial"] for row in group if row not in fitted[arm]] for arm, group in by_arm.items()}
    laws = {arm: _law(group) for arm, group in fitted.items()}
    speeds = _speeds(records)
    rows = [_trial_row(record, measures(records)[1:]) for record in records]
    decisions = decide(records, study.rule, baseline) if study.rule and baseline else []
    losses = loss_rows(records, baseline, study.rule.loss_within if study.rule else None) if baseline else []
    made = made_rows(records)
    settings = settings_read((record["point"], record.get("decay", {})) for record in records)
    write_csv(output / "trials.csv", rows)
    write_csv(output / "speed.csv", speeds)
    write_csv(output / "scores.csv", score_rows(records))
    write_json(output / "comparison.json", finite([asdict(difference) for difference in compared]))
    write_json(
        output / "scaling.json", finite([_law_row(arm, laws[arm], fitted[arm], left_out[arm]) for arm in by_arm])
    )
    write_json(output / "decision.json", finite([asdict(decision) for decision in decisions]))
    table = [cells_of(difference) for difference in compared]
    decided = [decision.cells() for decision in decisions]
    gains = slopes(records, baseline) if baseline else []
    shown = [{key: _cell(value) for key, value in row.items()} for row in rows]
    parts = {"decision": decided, "losses": losses, "comparison": table, "measures": measured, "made": made}
    for name, part in parts.items():
        write_tables(output / name, part)
    write_tables(output / "trials", shown, csv=False)
    write_json(output / "gains.json", finite(gains))
    page = render(
        "study.html",
        package="studies",
        title=f"{study.name}: study",
        study=study,
        columns=list(rows[0]),
        rows=[list(row.values()) for row in shown],
        rule=study.rule.sentences(len({order(record) for record in records}), max(1, len(by_arm) - 1), settings)
        if study.rule
        else [],
        tests=sum(decision.read for decision in decisions),
        decided=decided,
        losses=losses,
        measured=measured,
        made=made,
        compared=[
            {"cells": list(row.values()), "pairs": _pairs(difference.measure, difference.pairs)}
            for row, difference in zip(table, compared, strict=True)
        ],
        compared_columns=list(table[0]) if table else [],
        comparison_charts=[*difference_charts(compared), *slope_figures(gains, baseline or "")],
        laws=[{"left_out": left_out[arm], **_law_section(arm, laws[arm], fitted[arm])} for arm in by_arm],
        speed_columns=list(speeds[0]),
        speeds=[[_cell(value) for value in row.values()] for row in speeds],
        charts=_speed_charts(speeds),
        notes=notes,
        yaml=dump_study(study),
    )
    path = output / REPORT
    write_atomically(path, page)
    return path


def _trial_row(record: Record, tasks: Sequence[str]) -> dict[str, Any]:
    columns = {key: record[key] for key in ("parameters", "tokens", "loss", "loss_of")}
    scores = {task: value(record, task) for task in tasks}
    return {"trial": record["trial"], "arm": record["arm"] or "", **record["point"], **columns, **scores}


def _law(records: Sequence[Record]) -> PowerLaw | str:
    """Fit a law in the quantities that the trials vary, or say why no law can be fitted."""
    names = [name for name in ("parameters", "tokens") if len({record[name] for record in records}) >= 3]
    if not names:
        return "neither parameters nor tokens take three values or more"
    x = np.array([[record[name] for name in names] for record in records], np.float64)
    try:
        return fit(names, x, np.array([record["loss"] for record in records]))
    except InputError as error:
        return str(error)


def _frontier(law: PowerLaw, records: Sequence[Record]) -> list[Optimum]:
    """Compute the frontier at the budgets of the trials, and up to a hundred times beyond."""
    if len(law.names) < 2:
        return []
    spent = [6.0 * record["parameters"] * record["tokens"] for record in records]
    low, high = math.floor(math.log10(min(spent))), math.ceil(math.log10(max(spent)))
    return frontier(law, [10.0**power for power in range(low, high + 3)])


def _law_row(
    arm: str | None, law: PowerLaw | str, records: Sequence[Record], left_out: Sequence[str]
) -> dict[str, Any]:
    row = {"arm": arm, "left_out": list(left_out)}
    if isinstance(law, str):
        return {**row, "law": None, "why": law}
    return {**row, "law": asdict(law), "frontier": [asdict(optimum) for optimum in _frontier(law, records)]}


def _law_section(arm: str | None, law: PowerLaw | str, records: Sequence[Record]) -> dict[str, Any]:
    if isinstance(law, str):
        return {"arm": arm, "why": law}
    terms = " + ".join(
        f"{factor:.4g} / {name}^{exponent.mean:.3f}"
        for name, factor, exponent in zip(law.names, law.factors, law.exponents, strict=True)
    )
    return {
        "arm": arm,
        "why": None,
        "formula": f"loss = {law.irreducible.mean:.3f} + {terms}",
        "exponents": [
            f"{name}: {e.mean:.3f}, 95 % interval {e.low:.3f} to {e.high:.3f}"
            for name, e in zip(law.names, law.exponents, strict=True)
        ],
        "residuals": [
            {"trial": record["trial"], "loss": f"{record['loss']:.4f}", "residual": f"{100 * residual:+.2f} %"}
            for record, residual in zip(records, law.residuals, strict=True)
        ],
        "charts": [_law_chart(law, axis, records) for axis in range(len(law.names))],
        "frontier": [
            {
                "flops": f"{optimum.flops:.0e}",
                "parameters": format_count(optimum.parameters),
                "tokens": format_count(optimum.tokens),
                "loss": f"{optimum.loss:.3f}",
                "note": "extrapolated" if optimum.extrapolated else "",
            }
            for optimum in _frontier(law, records)
        ],
    }


def _law_chart(law: PowerLaw, axis: int, records: Sequence[Record]) -> Figure:
    """Draw the loss against one quantity, with a curve for each value of the other quantity."""
    name, others = law.names[axis], [other for other in law.names if other != law.names[axis]]
    groups: dict[float | None, list[Record]] = defaultdict(list)
    for record in records:
        groups[record[others[0]] if others else None].append(record)
    low, high = math.log10(law.lowest[axis]), math.log10(law.highest[axis])
    lines, keys = [], []
    for index, (other, group) in enumerate(sorted(groups.items(), key=lambda item: item[0] or 0)):

        def curve(start: float, end: float, other: float | None = other) -> list[tuple[float, float]]:
            points = []
            for log in np.linspace(start, end, CURVE_POINTS):
                x = [10**log] if other is None else [10**log, other] if axis == 0 else [other, 10**log]
                points.append((float(log), law.predict(*x)))
            return points

        label = name if other is None else f"{format_count(other)} {others[0]}"
        color = f"c{index % 8}"
        keys.append(Line(label, curve(low, high), color))
        lines += [keys[-1], Line(f"{label}, extrapolated", curve(high, high + 1), color, faint=True)]
        measured = sorted((math.log10(record[name]), record["loss"]) for record in group)
        lines += [Line(f"{label}, measured", [point], color) for point in measured]
    chart = line_chart(
        f"loss against {name}",
        lines,
        number=lambda y: f"{y:.3g}",
        x_name=name,
        x_number=lambda log: format_count(10**log),
        size=WIDE,
    )
    return Figure(f"Loss against {name} (points: trials; faint: extrapolated)", chart, keys=keys, wide=True)


def _speeds(records: Sequence[Record]) -> list[dict[str, Any]]:
    """List the speed and the scaling efficiency of each trial.

    The efficiency is relative to the trial with the fewest workers: `strong` with the same batch, `weak` with the same
    number of sequences per worker.
    """
    rows = []
    for record in records:
        speed = record["speed"]
        row = {
            "trial": record["trial"],
            "parameters": record["parameters"],
            "workers": speed["workers"],
            "sequences": record["sequences"],
            "tokens_per_second": speed["tokens_per_second"],
            "mfu": speed["mfu"],
        }
        for name, is_alike in (("strong", _same_batch), ("weak", _same_batch_per_worker)):
            peers = [
                other
                for other in records
                if other["arm"] == record["arm"]
                and other["parameters"] == record["parameters"]
                and is_alike(other, record)
            ]
            fewest = min(peers, key=lambda other: other["speed"]["workers"])
            varied = len({other["speed"]["workers"] for other in peers}) > 1
            row[f"{name}_efficiency"] = _speed_per_worker(record) / _speed_per_worker(fewest) if varied else math.nan
        rows.append(row)
    return rows


def _same_batch(one: Record, other: Record) -> bool:
    return bool(one["sequences"] == other["sequences"])


def _same_batch_per_worker(one: Record, other: Record) -> bool:
    return bool(one["sequences"] * other["speed"]["workers"] == other["sequences"] * one["speed"]["workers"])


def _speed_per_worker(record: Record) -> float:
    return float(record["speed"]["tokens_per_second"] / record["speed"]["workers"])


def _speed_charts(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    charts = []
    wanted: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
        ("parameters", "tokens_per_second", "Tokens per second against parameters", format_count),
        ("parameters", "mfu", "MFU against parameters", lambda y: f"{100 * y:.3g} %"),
        ("workers", "tokens_per_second", "Tokens per second against workers", format_count),
    )
    for x, y, title, number in wanted:
        if len({row[x] for row in rows}) < 2:
            continue
        points = [(math.log10(row[x]), row[y]) for row in sorted(rows, key=lambda row: row[x])]
        chart = line_chart(
            title,
            [Line(title, [point], "c0") for point in points],
            number=number,
            x_name=x,
            x_number=lambda log: format_count(10**log),
            from_zero=True,
            size=WIDE,
        )
        charts.append(Figure(title, chart, wide=True))
    return charts


def _pairs(measure: str, pairs: Sequence[float]) -> str:
    return ", ".join(f"{scale_of(measure)[0] * pair:+.3f}" for pair in pairs)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
