"""Detour's entry points, and the guard that keeps a user's own files from shadowing its packages.

Detour's packages have everyday names (`engine`, `configs`, ...). A user's `engine.py` would win over ours wherever the
user's directory comes first in `sys.path`: in Ray's workers, and with `PYTHONPATH=.`. Therefore every process of Detour
enters through this module. Its name is unique, and importing it binds our packages to the directory that it lies in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = frozenset({"configs", "datapipe", "engine", "launcher", "monitoring", "studies"})
HOME = Path(__file__).resolve().parent
"""Directory of our packages: site-packages, or the source tree of an editable installation."""


class _Guard(MetaPathFinder):
    """Finds our packages in HOME, before `sys.path` is searched."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(HOME)]) if fullname in PACKAGES else None


def guard() -> None:
    """Bind our packages to HOME in this process, and forget modules of the same names from elsewhere.

    Importing this module calls it, so spawned processes are guarded before they unpickle a function of ours.
    """
    if any(type(finder).__name__ == _Guard.__name__ for finder in sys.meta_path):  # as `__main__`, or by name
        return
    sys.meta_path.insert(0, _Guard())
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES and not _is_ours(module):
            del sys.modules[name]


def _is_ours(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(HOME)


class Worker:
    """The Ray actor of a training process: `launcher.worker.Worker` behind the guard.

    Ray unpickles an actor by importing the module of its class, which a user's files must not shadow.
    """

    def __init__(self) -> None:
        from launcher import worker

        self._worker = worker.Worker()

    def locate(self, *arguments: Any) -> Any:
        """See `launcher.worker.Worker.locate`."""
        return self._worker.locate(*arguments)

    def warm_up(self, *arguments: Any) -> None:
        """See `launcher.worker.Worker.warm_up`."""
        self._worker.warm_up(*arguments)

    def setup(self, *arguments: Any) -> None:
        """See `launcher.worker.Worker.setup`."""
        self._worker.setup(*arguments)

    def open_store(self, *arguments: Any) -> int:
        """See `launcher.worker.Worker.open_store`."""
        return self._worker.open_store(*arguments)

    def train(self, *arguments: Any) -> Any:
        """See `launcher.worker.Worker.train`."""
        return self._worker.train(*arguments)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function: as a Ray task, it is unpickled behind the guard because Ray imports this module first."""
    return function(*arguments)


def main() -> None:
    """Run `detour`."""
    from launcher.cli import main

    main()


def train_main() -> None:
    """Run `detour-train`."""
    from launcher.cli import train_main

    train_main()


guard()

if __name__ == "__main__":
    main()
