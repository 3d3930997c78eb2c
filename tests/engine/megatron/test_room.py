"""Private names of other packages stay in `engine/megatron`.

Ruff's SLF001 sees neither `torch._name` nor `from package import _name`. A line with `noqa: TID251` is exempt.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OURS = ("configs", "datapipe", "engine", "launcher", "monitoring", "studies")
ROOM = ROOT / "engine" / "megatron"
FILES = [path for package in OURS for path in (ROOT / package).rglob("*.py") if ROOM not in path.parents]


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_reaches(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private name that a module imports or reads from a package of others."""
    nodes = list(ast.walk(ast.parse(source)))
    foreign = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [(alias.asname or alias.name.split(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
        else:
            continue
        for bound, name in names:
            if name.split(".")[0] not in (
                *OURS,
                *sys.stdlib_module_names,
                "_typeshed",
            ):  # exists for type checkers alone
                foreign.add(bound)
                if private(name):
                    yield node.lineno, name
    for node in nodes:
        if isinstance(node, ast.Attribute) and private(node.attr):
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id in foreign:
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_others_outside_the_room(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [reach for reach in private_reaches("\n".join(lines)) if "noqa: TID251" not in lines[reach[0] - 1]]
    assert found == []


def test_what_counts_as_a_private_reach() -> None:
    source = (
        "import torch as t\nfrom ray import _private\nfrom omegaconf._utils import f\nt._C.x\nt.cpu._y()\nt.__name__\n"
    )
    assert list(private_reaches(source)) == [
        (2, "ray._private"),
        (3, "omegaconf._utils.f"),
        (4, "t._C"),
        (5, "t.cpu._y"),
    ]
