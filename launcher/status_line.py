"""The line that shows the progress of work before the training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

PLAIN_SECONDS = 30.0
"""Seconds between two lines where the output is no terminal."""


@contextmanager
def status_line(console: Console, first: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that replaces the shown line; without a terminal it prints a line every PLAIN_SECONDS.

    Args:
        console: Console to print on.
        first: The first line, shown on a terminal only.
    """
    if console.is_terminal:
        with console.status(first) as status:
            yield status.update
        return
    last_shown = time.monotonic()

    def show(line: str) -> None:
        nonlocal last_shown
        if time.monotonic() >= last_shown + PLAIN_SECONDS:
            last_shown = time.monotonic()
            console.print(line, soft_wrap=True, highlight=False)

    yield show
