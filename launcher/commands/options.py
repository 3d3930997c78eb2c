"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from configs.schema import RunConfig


def _print_version(wanted: bool) -> None:
    if wanted:
        from configs.versions import version_line

        print(version_line())
        raise typer.Exit


def load_run(arguments: list[str] | None, nodes: int | None) -> RunConfig:
    """Load the recipe that `[RECIPE] [KEY=VALUE]...` and `--nodes` describe."""
    from configs.load import load_config

    overrides = list(arguments or ())
    is_recipe = bool(overrides) and ("=" not in overrides[0] or Path(overrides[0]).is_file())
    recipe = overrides.pop(0) if is_recipe else None
    config = load_config(recipe, overrides)
    if nodes is None:
        return config
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"nodes": nodes})})


def split_models(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Divide `MODEL... [KEY=VALUE]...` into the models and the overrides.

    Raises:
        InputError: No model is among them.
    """
    from configs.errors import InputError

    models, overrides = ([word for word in arguments if ("=" in word) == wanted] for wanted in (False, True))
    if not models:
        raise InputError(
            f"no model is given beside {', '.join(overrides)}; name a run, a checkpoint or a Hugging Face model first",
            key="MODEL",
            code="no-model",
        )
    return models, overrides


Output = Annotated[Path, typer.Option(help="Directory to write.")]
TaskData = Annotated[Path | None, typer.Option(help="Folder of the task's files; default: the YAML's own.")]
Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
]
