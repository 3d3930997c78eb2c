"""House rule 1: a docstring begins with an imperative verb or a noun phrase."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "datapipe", "engine", "launcher", "monitoring", "studies", "benchmarks", "tests", "detour_train.py")
"""Folders and files that are checked."""
FORBIDDEN = ("Of ", "Its ", "By ", "With ", "What ", "Where ")


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Every string that stands as a statement: of modules, classes, functions and attributes, private ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


@pytest.mark.parametrize("room", ROOMS)
def test_no_docstring_begins_with_a_preposition_or_a_pronoun(room: str) -> None:
    path = ROOT / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{text.lineno}: {text.value.strip().splitlines()[0]}"
        for file in files
        for text in docstrings(ast.parse(file.read_text(encoding="utf-8")))
        if text.value.strip().startswith(FORBIDDEN)
    ]
    assert not found, "\n".join(found)
