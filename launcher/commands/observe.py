"""Commands that watch runs: monitor, compare, targets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def monitor(
    target: Annotated[str, typer.Argument(help="A run directory, or its metrics endpoint (http://host:port).")],
    prometheus: Annotated[str, typer.Option(help="Prometheus that knows the firing alerts.")] = "http://127.0.0.1:9090",
    once: Annotated[bool, typer.Option("--once", help="Print the state once.")] = False,
) -> None:
    """Show the live state of a run: phase, loss, throughput, time left, restarts, alerts."""
    from monitoring.monitor import watch

    watch(target, prometheus, once)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two to 64 run directories.")],
    output: Annotated[Path, typer.Option(help="The page of curves to write.")] = Path("compare.html"),
) -> None:
    """Compare runs: print a table, and write a page of curves."""
    from monitoring.compare import compare as compare_runs

    print(compare_runs(runs, output))


def targets(
    directory: Annotated[Path, typer.Argument(help="`monitoring.targets` of the runs.")] = Path("/tmp/detour/targets"),
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, help="Port to listen on; 0: any free port.")] = 9463,
) -> None:
    """Serve the list of live runs on this machine over HTTP, for a Prometheus on another machine."""
    from monitoring.discovery import serve_targets

    server = serve_targets(directory, address, port)
    print(
        f"http://{address}:{server.server_address[1]}/ lists the runs; --address 0.0.0.0 opens it to other machines",
        flush=True,
    )
    server.serve_forever()
