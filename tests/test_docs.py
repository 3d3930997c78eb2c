"""The documents agree with the repository: links, commands, and the names of files and functions."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from configs.load import load_config
from launcher.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.MULTILINE)


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_have_the_options_and_keys_that_they_use(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    recipes = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "phases:" in block]
    own_recipe = tmp_path / "own.yaml"
    own_recipe.write_text(recipes[-1] if recipes else yaml.safe_dump({}))
    for command in COMMAND.findall(text):
        words = shlex.split(command.split(" -- ")[-1].replace("\\\n", " "), comments=True)
        if words[0] == "detour-train":
            words = ["detour", "train", *words[1:]]
        if words[0] != "detour":
            continue
        name, *arguments = words[1:]
        parsed = typer.main.get_command(app).commands[name].make_context(name, arguments).params  # type: ignore[attr-defined]
        if name == "train":
            recipe, *overrides = parsed["arguments"]
            own = recipe.endswith(".yaml")
            load_config((str(own_recipe) if recipes else "one-gpu-evening") if own else recipe, overrides)


def test_readme_is_short_and_has_short_lines() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 1000
    assert not [line for line in text.splitlines() if len(line) > 120]


@pytest.mark.parametrize("page", [ROOT / "docs" / "walkthrough.md", ROOT / "docs" / "architecture.md"], ids=ids)
def test_files_and_functions_that_are_named_exist(page: Path) -> None:
    """`path/file.py` exists, and so does each `function` or `Class.method` in parentheses after it."""
    text = page.read_text()
    missing = [name for name in re.findall(r"`([a-z_/0-9]+\.py)`", text) if not (ROOT / name).exists()]
    for name, functions in re.findall(r"`([a-z_/0-9]+\.py)`\s+\((`[^)]*)\)", text):
        if name not in missing:
            defined = definitions(ROOT / name)
            missing += [f"{name}: {word}" for word in re.findall(r"`([\w.]+)`", functions) if word not in defined]
    assert not missing


def definitions(path: Path) -> set[str]:
    """Return the functions, classes, methods and constants of a module."""
    names: set[str] = set()

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return names
