"""Entry points of Detour, and the guard that keeps a user's own files from shadowing its packages.

Detour's packages have everyday names (`engine`, `configs`, ...). A working directory with an `engine.py` of the user's
own would win over them wherever that directory comes first in `sys.path`: in Ray's workers, with `PYTHONPATH=.`, and in
jobs that `ray job submit --working-dir .` starts. So every process of Detour enters through this module, whose name is
Detour's alone, and which binds the packages to the directory that it lies in.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

PACKAGES = frozenset({"configs", "datapipe", "engine", "launcher", "monitoring", "studies"})
HOME = Path(__file__).resolve().parent
"""site-packages, or the source tree of an editable installation."""


class _Guard(MetaPathFinder):
    """Finds Detour's packages in HOME, before `sys.path` is looked at."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(HOME)]) if fullname in PACKAGES else None


def guard() -> None:
    """Bind Detour's packages to HOME in this process, and forget modules of the same names from elsewhere.

    Importing this module does it. A spawned process imports it before it unpickles anything, and Ray calls it by name
    in each worker.
    """
    if any(type(finder).__name__ == _Guard.__name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Guard())
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES and not _is_ours(module):
            del sys.modules[name]


def _is_ours(module: ModuleType) -> bool:
    return str(getattr(module, "__file__", None) or "").startswith(f"{HOME}/")


def main() -> None:
    """Run `detour`."""
    from launcher.cli import main

    main()


def train_main() -> None:
    """Run `detour-train`."""
    from launcher.cli import train_main

    train_main()


def trial_main() -> None:
    """Run `detour-train` as a trial of a study, which is asked to stop when the study is gone."""
    from launcher.cli import train_main
    from launcher.trials import stop_with_parent

    stop_with_parent()
    train_main()


guard()

if __name__ == "__main__":
    main()
