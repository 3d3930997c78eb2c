"""The wheel carries everything and works from any directory, whatever files of the user's lie there."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from tests.chaos.loopback import LoopbackCluster
from tests.launcher.toy import events, recipe, run

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "datapipe", "engine", "monitoring", "launcher", "studies")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a virtual environment in which the wheel is installed, not this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build in the tree itself could pick up what an earlier one left
    source.mkdir()
    for name in (*PACKAGES, "detour_train.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("detour_train-*.whl")

    empty = folder / "venv"
    venv.create(empty, with_pip=False)
    into = ("--python", empty / "bin/python", "install", "--ignore-installed", "--no-deps", "--no-index")
    done = run(*pip, *into, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    (site,) = empty.glob("lib/python*/site-packages")
    # Only now, or pip would find the project installed. A .pth line adds our site-packages, with the dependencies,
    # but not what its own .pth files (this tree) add.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return empty / "bin"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A project of the user's whose files have the names of our packages; importing any of them fails."""
    project = tmp_path / "project"
    for number, name in enumerate(PACKAGES):
        path = project / name / "__init__.py" if number % 2 else project / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise RuntimeError('the {name} of the user was imported')\n")
    return project


def _toy(**changes: object) -> str:
    tree = recipe(Path("shards"), cluster={"workers_per_node": 1}, **changes)
    tree["data"]["sources"][0]["text"] = "package://corpus/tico19_fr.jsonl.gz"
    return yaml.safe_dump(tree)


def test_wheel_trains_in_a_directory_of_our_packages_names(installed: Path, hostile: Path) -> None:
    listed = run(installed / "detour", "recipes", cwd=hostile, path=None)
    assert "modernbert-base-bio-en" in listed.stdout, listed.stderr

    (hostile / "detour.yaml").write_text(_toy())
    trained = run(installed / "detour-train", cwd=hostile, path=None)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (hostile / "runs/toy/hf/model.safetensors").is_file()
    assert (hostile / "runs/toy/report.html").is_file()
    assert "worker_failed" not in events(hostile / "runs/toy")


def test_wheel_works_where_the_users_directory_comes_first_in_the_path(installed: Path, hostile: Path) -> None:
    """With PYTHONPATH=. and two processes that tokenize; as a submitted job; and the trials of a study."""
    text = "package://corpus/tico19_fr.jsonl.gz"
    options = ("--tokenizer", "package://tokenizer/modernbert", "--output", "shards", "--processes", "2")
    prepared = run(installed / "detour", "prepare", text, *options, cwd=hostile, path=Path())
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr

    short = [{"objective": "clm", "steps": 1}, {"objective": "mlm", "steps": 1}]
    (hostile / "detour.yaml").write_text(_toy(phases=short, cluster={"workers_per_node": 1}))
    (hostile / "study.yaml").write_text(
        yaml.safe_dump({"name": "seeds", "recipe": "detour.yaml", "grid": {"data.seed": [1, 2]}})
    )
    with LoopbackCluster(1, cpus=2, path=None, python=installed / "python") as cluster:
        command = (installed / "detour-train", "--output", hostile / "job")
        said = cluster.job("submit", "--working-dir", hostile, "--", *command)
        assert "toy is complete" in said
        assert "worker_failed" not in events(hostile / "job")
        path = {"PYTHONPATH": ".", "RAY_ADDRESS": cluster.environment["RAY_ADDRESS"]}
        studied = run(installed / "detour", "study", "study.yaml", cwd=hostile, env=cluster.environment | path)
    assert studied.returncode == 0, studied.stdout + studied.stderr
    assert (hostile / "runs/seeds/report.html").is_file()
