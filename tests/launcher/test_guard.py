"""The import guard: our packages win over a user's files of the same names. test_wheel runs whole commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from detour_train import PACKAGES
from tests.launcher.toy import ROOT, environment, run


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds the user's files first, and Detour behind them."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text("OF_THE_USER = True\n")
    return environment(None) | {"PYTHONPATH": f".{os.pathsep}{ROOT}"}


def imported(code: str, directory: Path, env: dict[str, str]) -> list[str]:
    names = ", ".join(sorted(PACKAGES))
    code += f"\nimport {names}\nfor module in ({names}): print(module.__file__)"
    result = run(sys.executable, "-c", code, cwd=directory, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_users_files_are_first_in_the_path(tmp_path: Path, env: dict[str, str]) -> None:
    assert imported("", tmp_path, env) == [f"{tmp_path}/{name}.py" for name in sorted(PACKAGES)]


@pytest.mark.parametrize("before", ["", "import configs, engine; assert engine.OF_THE_USER"])
def test_the_guard_binds_our_packages_and_forgets_the_users(before: str, tmp_path: Path, env: dict[str, str]) -> None:
    files = imported(f"{before}\nimport detour_train", tmp_path, env)
    assert files == [f"{ROOT}/{name}/__init__.py" for name in sorted(PACKAGES)]


def test_a_spawned_process_is_guarded_before_it_unpickles_a_function_of_ours(
    tmp_path: Path, env: dict[str, str]
) -> None:
    """As the installed script `detour` is, the main module of the parent is imported by the child first."""
    (tmp_path / "detour").write_text(
        "import multiprocessing\n"
        "import detour_train\n"
        "from configs.units import format_count\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(format_count, (2_000_000,)))\n"
    )
    result = run(sys.executable, "detour", cwd=tmp_path, env=env, timeout=60)
    assert result.stdout.strip() == "2M", result.stdout + result.stderr
