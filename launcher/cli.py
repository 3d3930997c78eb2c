"""The command lines `detour` and `detour-train`: the list of the commands, which are in `launcher/commands`."""

from __future__ import annotations

import typer

from launcher.commands import configuration, data, measure, models, observe, runs
from launcher.commands.options import Version
from launcher.exits import run_command

app = typer.Typer(name="detour", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def detour(version: Version = False) -> None:
    """Adapt a ModernBERT encoder to its domain by the CLM detour."""


app.command()(runs.train)
app.command()(runs.plan)
app.command()(data.prepare)
app.command()(data.inspect)
app.command()(observe.monitor)
app.command()(observe.compare)
app.command()(observe.targets)
app.command()(models.export)
app.command(name="import")(models.import_)
app.command()(models.merge)
app.command()(configuration.recipes)
app.command()(configuration.schema)
app.command()(runs.profile)
app.command()(runs.doctor)
app.command()(measure.drift)
app.command()(measure.evaluate)
app.command()(measure.probe)
app.command()(measure.audit)
app.command()(models.transplant)
app.command()(measure.study)


def main() -> None:
    """Run `detour`."""
    run_command(app)


def train_main() -> None:
    """Run `detour-train`."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(runs.train)
    run_command(command)
