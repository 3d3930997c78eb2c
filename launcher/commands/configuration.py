"""Commands that print what a run can be: recipes, schema."""

from __future__ import annotations

import json


def recipes() -> None:
    """List the shipped recipes."""
    from configs.load import RECIPES, shipped

    texts = shipped(RECIPES)
    width = max(map(len, texts)) + 2
    for name, text in texts.items():
        first_line = text.partition("\n")[0]
        print(f"{name:<{width}}{first_line.lstrip('# ') if first_line.startswith('#') else ''}")


def schema() -> None:
    """Print the JSON schema of a run's configuration."""
    from configs.schema import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))
