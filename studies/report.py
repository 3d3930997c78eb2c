"""The report of a study: tables as JSON and CSV, and one HTML page with its charts."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import InputError
from configs.units import format_count
from monitoring.charts import WIDE, Line, line_chart
from studies.differences import Difference, Record, differences, measures, value
from studies.figures import render
from studies.plan import Study, dump_study
from studies.scaling import Optimum, PowerLaw, fit, frontier

REPORT = "report.html"
CURVE = 40
"""Points of a drawn law."""


def write_report(study: Study, records: Sequence[Record], output: Path) -> Path:
    """Write trials.csv, comparison.json, scaling.json, speed.csv and report.html; the path of the last.

    All but speed.csv and the page's section on speed follow from the configuration and the seeds alone.
    """
    baseline = study.baseline or next(iter(study.arms), None)
    compared = differences(records, baseline) if baseline else []
    laws = {arm: _law([record for record in records if record["arm"] == arm]) for arm in _arms(records)}
    speeds = _speeds(records)
    rows = [
        {"trial": record["trial"], "arm": record["arm"] or "", **record["point"]}
        | {key: record[key] for key in ("parameters", "tokens", "loss", "loss_of")}
        | {task: value(record, task) for task in measures(records)[1:]}
        for record in records
    ]
    _write_csv(output / "trials.csv", rows)
    _write_csv(output / "speed.csv", speeds)
    _write_json(output / "comparison.json", [asdict(difference) for difference in compared])
    _write_json(
        output / "scaling.json",
        [
            {"arm": arm, "law": asdict(law), "frontier": [asdict(optimum) for optimum in _frontier(law, records)]}
            if isinstance(law, PowerLaw)
            else {"arm": arm, "law": None, "why": law}
            for arm, law in laws.items()
        ],
    )
    page = render(
        "study.html",
        title=f"{study.name}: study",
        study=study,
        columns=list(rows[0]),
        rows=[[_shown(value) for value in row.values()] for row in rows],
        compared=[_difference(difference) for difference in compared],
        laws=[_shown_law(arm, law, records) for arm, law in laws.items()],
        speed_columns=list(speeds[0]),
        speeds=[[_shown(value) for value in row.values()] for row in speeds],
        charts=_speed_charts(speeds),
        yaml=dump_study(study),
    )
    path = output / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def _arms(records: Sequence[Record]) -> list[str | None]:
    return list(dict.fromkeys(record["arm"] for record in records))


def _law(records: Sequence[Record]) -> PowerLaw | str:
    """A law in what the trials vary, or why there is none."""
    kinds = [name for name in ("parameters", "tokens") if len({record[name] for record in records}) >= 3]
    if not kinds:
        return "neither parameters nor tokens take three values or more"
    x = np.array([[record[name] for name in kinds] for record in records], np.float64)
    try:
        return fit(kinds, x, np.array([record["loss"] for record in records]))
    except InputError as error:
        return str(error)


def _frontier(law: PowerLaw, records: Sequence[Record]) -> list[Optimum]:
    """At the compute of the trials, and one and two powers of ten beyond."""
    if len(law.names) < 2:
        return []
    spent = [6.0 * record["parameters"] * record["tokens"] for record in records]
    low, high = math.floor(math.log10(min(spent))), math.ceil(math.log10(max(spent)))
    return frontier(law, [10.0**power for power in range(low, high + 3)])


def _shown_law(arm: str | None, law: PowerLaw | str, records: Sequence[Record]) -> dict[str, Any]:
    if isinstance(law, str):
        return {"arm": arm, "why": law}
    mine = [record for record in records if record["arm"] == arm]
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
            for record, residual in zip(mine, law.residuals, strict=True)
        ],
        "charts": [_law_chart(law, place, mine) for place in range(len(law.names))],
        "frontier": [
            {
                "flops": f"{optimum.flops:.0e}",
                "parameters": format_count(optimum.parameters),
                "tokens": format_count(optimum.tokens),
                "loss": f"{optimum.loss:.3f}",
                "note": "extrapolated" if optimum.extrapolated else "",
            }
            for optimum in _frontier(law, mine)
        ],
    }


def _law_chart(law: PowerLaw, place: int, records: Sequence[Record]) -> dict[str, Any]:
    """Loss against one quantity, a curve for each value of the other; dashed by name where it is extrapolated."""
    name, others = law.names[place], [other for other in law.names if other != law.names[place]]
    groups: dict[float | None, list[Record]] = defaultdict(list)
    for record in records:
        groups[record[others[0]] if others else None].append(record)
    lines = []
    for index, (other, group) in enumerate(sorted(groups.items(), key=lambda item: item[0] or 0)):
        label = name if other is None else f"{format_count(other)} {others[0]}"
        points = sorted((math.log10(record[name]), record["loss"]) for record in group)
        low, high = math.log10(law.lowest[place]), math.log10(law.highest[place])

        def at(log: float, other: float | None = other) -> tuple[float, float]:
            x = [10**log] if other is None else [10**log, other] if place == 0 else [other, 10**log]
            return log, law.predict(*x)

        curve = [at(log) for log in np.linspace(low, high, CURVE)]
        beyond = [at(log) for log in np.linspace(high, high + 1, CURVE)]
        color = f"c{index % 8}"
        lines += [Line(label, curve, color), Line(f"{label}, extrapolated", beyond, color, faint=True)]
        lines += [Line(f"{label}, measured", [point], color) for point in points]
    chart = line_chart(
        f"loss against {name}",
        lines,
        number=lambda y: f"{y:.3g}",
        x_name=name,
        x_number=lambda log: format_count(10**log),
        size=WIDE,
    )
    keys = [line for line in lines if len(line.points) == CURVE and not line.faint]
    return {"title": f"Loss against {name} (points: trials; faint: extrapolated)", "chart": chart, "keys": keys}


def _speeds(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Speed of each trial, and against the one of fewest workers its strong (same batch) and weak (batch grown with the
    workers) scaling efficiency.
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
        for kind, alike in (("strong", _same_batch), ("weak", _same_share)):
            peers = [
                other
                for other in records
                if other["arm"] == record["arm"]
                and other["parameters"] == record["parameters"]
                and alike(other, record)
            ]
            fewest = min(peers, key=lambda other: other["speed"]["workers"])
            spread = len({other["speed"]["workers"] for other in peers}) > 1
            row[f"{kind}_efficiency"] = _each(record) / _each(fewest) if spread else math.nan
        rows.append(row)
    return rows


def _same_batch(one: Record, other: Record) -> bool:
    return bool(one["sequences"] == other["sequences"])


def _same_share(one: Record, other: Record) -> bool:
    return bool(one["sequences"] * other["speed"]["workers"] == other["sequences"] * one["speed"]["workers"])


def _each(record: Record) -> float:
    return float(record["speed"]["tokens_per_second"] / record["speed"]["workers"])


def _speed_charts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    charts = []
    wanted: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
        ("parameters", "tokens_per_second", "Tokens a second against parameters", format_count),
        ("parameters", "mfu", "MFU against parameters", lambda y: f"{100 * y:.3g} %"),
        ("workers", "tokens_per_second", "Tokens a second against workers", format_count),
    )
    for x, y, title, number in wanted:
        if len({row[x] for row in rows}) < 2:
            continue
        logs = [(math.log10(row[x]), row[y]) for row in sorted(rows, key=lambda row: row[x])]
        lines = [Line(title, [point], "c0") for point in logs]
        chart = line_chart(
            title, lines, number=number, x_name=x, x_number=lambda log: format_count(10**log), from_zero=True, size=WIDE
        )
        charts.append({"title": title, "chart": chart, "keys": []})
    return charts


def _difference(difference: Difference) -> dict[str, Any]:
    scale, unit = (1, "nats") if difference.measure == "loss" else (100, "points")

    def interval(low: float, high: float) -> str:
        return f"{scale * low:+.3f} to {scale * high:+.3f}" if math.isfinite(low) else "-"

    return {
        "what": f"{difference.arm} - {difference.baseline}",
        "measure": difference.measure,
        "mean": f"{scale * difference.bootstrap.mean:+.3f} {unit}",
        "bootstrap": interval(difference.bootstrap.low, difference.bootstrap.high),
        "students": interval(difference.students.low, difference.students.high),
        "pairs": ", ".join(f"{scale * pair:+.3f}" for pair in difference.pairs),
        "verdict": difference.verdict,
    }


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """NaN and infinities as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
