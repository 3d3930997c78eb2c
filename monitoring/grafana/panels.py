"""Panels in Detour's one style: a unit, a legend, a description and thresholds each, and the datasource variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries, xychart
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.xychart import SeriesMapping, XYShowMode

DATASOURCE = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")

Query = tuple[str, str]
"""PromQL and the legend of its series."""
Steps = Sequence[tuple[float, str]]
"""From this value on, this colour; below the first it is green."""


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    thresholds: Steps = (),
    low: float | None = None,
    high: float | None = None,
    logarithmic: bool = False,
) -> timeseries.Panel:
    """Lines over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(width)
        .height(8)
        .line_width(2)
        .fill_opacity(4)
        .show_points(common_models.VisibilityMode.NEVER)
        .thresholds(_thresholds(thresholds))
        .thresholds_style(
            common.GraphThresholdsStyleConfig().mode(
                common_models.GraphThresholdsStyleMode.DASHED
                if thresholds
                else common_models.GraphThresholdsStyleMode.OFF
            )
        )
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        .targets(_targets(queries))
    )
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10))
    return _bounded(panel, low, high)


def figure(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    width: int = 4,
    thresholds: Steps = (),
    decimals: float | None = None,
    by_name: bool = False,
) -> stat.Panel:
    """The value now in large type, or the name of the series where that is the message.

    The query is an instant one: over a range, what was true of an earlier phase would be a second value.
    """
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(width)
        .height(4)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .text_mode(common_models.BigValueTextMode.NAME if by_name else common_models.BigValueTextMode.VALUE)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(thresholds))
        .targets([_target(*query, "A").instant()])
    )
    return panel if decimals is None else panel.decimals(decimals)


def ranking(
    title: str,
    description: str,
    labels: dict[str, str],
    columns: dict[str, tuple[str, str]],
    *,
    describing: str | None = None,
    width: int = 24,
) -> table.Panel:
    """A row for each combination of labels.

    Args:
        labels: Columns of labels: the label, and the name of its column.
        columns: Columns of numbers by name: PromQL and unit.
        describing: PromQL whose labels are shown and whose value is not.
    """
    queries = {name: expression for name, (expression, _) in columns.items()}
    queries |= {"": describing} if describing else {}
    letters = {name: chr(ord("A") + index) for index, name in enumerate(queries)}
    order = [*labels, *(f"Value #{letters[name]}" for name in columns)]
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit("short")
        .span(width)
        .height(8)
        .thresholds(_thresholds(()))
        .targets(
            [
                _target(expression, "{{run}}", letters[name]).instant().format(PromQueryFormat.TABLE)
                for name, expression in queries.items()
            ]
        )
        .with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            dashboard.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {"Time": True} | ({f"Value #{letters['']}": True} if describing else {}),
                    "indexByName": {name: index for index, name in enumerate(order)},
                    "renameByName": labels | {f"Value #{letters[name]}": name for name in columns},
                },
            )
        )
    )
    for name, (_, unit) in columns.items():
        panel.override_by_name(name, [dashboard.DynamicConfigValue(id_val="unit", value=unit)])
    return panel


def against(title: str, description: str, unit: str, y: str, x: str, x_name: str, by: str, width: int = 12) -> Any:
    """One curve for each value of the label `by`: PromQL `y` over PromQL `x`, both with that label alone."""
    return (
        xychart.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(width)
        .height(9)
        .show(XYShowMode.LINES)
        .thresholds(_thresholds(()))
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .targets(
            [
                _target(x, "{{" + by + "}}", "X").format(PromQueryFormat.TABLE),
                _target(y, "{{" + by + "}}", "Y").format(PromQueryFormat.TABLE),
            ]
        )
        .with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            dashboard.DataTransformerConfig(
                id_val="organize",
                options={"excludeByName": {"Time": True}, "renameByName": {"Value #X": x_name, "Value #Y": title}},
            )
        )
        .with_transformation(
            dashboard.DataTransformerConfig(
                id_val="partitionByValues", options={"fields": [by], "naming": {"asLabels": True}, "keepFields": False}
            )
        )
        .mapping(SeriesMapping.AUTO)
        .override_by_name(x_name, [dashboard.DynamicConfigValue(id_val="unit", value="short")])
    )


def _target(expression: str, legend: str, letter: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter).datasource(DATASOURCE)


def _targets(queries: Sequence[Query]) -> list[Any]:
    return [
        _target(expression, legend, chr(ord("A") + index)).range() for index, (expression, legend) in enumerate(queries)
    ]


def _bounded(panel: timeseries.Panel, low: float | None, high: float | None) -> timeseries.Panel:
    if low is not None:
        panel.min(low)
    if high is not None:
        panel.max(high)
    return panel


def _thresholds(steps: Steps) -> Any:
    return (
        builders.ThresholdsConfig()
        .mode(dashboard.ThresholdsMode.ABSOLUTE)
        .steps(
            [
                dashboard.Threshold(value=None, color="green"),
                *(dashboard.Threshold(value=value, color=color) for value, color in steps),
            ]
        )
    )
