"""How far a piece of work before the training is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

PLAIN_SECONDS = 30.0


@contextmanager
def status_line(console: Console, first: str) -> Iterator[Callable[[str], None]]:
    """Yields what shows a line in place of the one before; where no terminal can, it prints one every 30 seconds."""
    if console.is_terminal:
        with console.status(first) as status:
            yield status.update
        return
    shown = time.monotonic()

    def show(line: str) -> None:
        nonlocal shown
        if time.monotonic() >= shown + PLAIN_SECONDS:
            shown = time.monotonic()
            console.print(line, soft_wrap=True, highlight=False)

    yield show
