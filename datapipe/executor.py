"""Running tasks in this process by the interface of a pool."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class InProcessExecutor(Executor):
    """Runs each task at once in this process, for inputs so small that a pool would take longer to start."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """Run the task before returning. What it raises is raised here."""
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **keywords))
        return future
