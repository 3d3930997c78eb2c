"""The wheel carries everything and works from any directory, whatever files of the user's lie there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.chaos.loopback import LoopbackCluster
from tests.launcher.toy import environment, events, recipe, run, write
from tests.toy_recipe import TOKENIZER

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
    for name in PACKAGES:
        path = project / f"{name}.py" if name in ("engine", "datapipe") else project / name / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise RuntimeError('the {name} of the user was imported')\n")
    tree = recipe(Path("shards"), phases=[{"objective": "clm", "steps": 1}, {"objective": "mlm", "steps": 1}])
    tree["data"]["sources"][0]["text"] = "package://corpus/tico19_fr.jsonl.gz"
    write(project / "detour.yaml", tree)
    return project


def complete(directory: Path) -> bool:
    """Return whether a run exported its model and wrote its report without a failure of its workers."""
    files = [directory / "hf/model.safetensors", directory / "report.html"]
    return all(file.is_file() for file in files) and "worker_failed" not in events(directory)


@pytest.mark.parametrize("first_in_path", [False, True])
def test_wheel_trains_among_files_of_our_packages_names(installed: Path, hostile: Path, first_in_path: bool) -> None:
    env = environment(Path() if first_in_path else None)
    trained = run(installed / "detour-train", cwd=hostile, env=env)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert complete(hostile / "runs/toy")


def test_other_commands_of_the_wheel_work_there(installed: Path, hostile: Path) -> None:
    """The user's directory comes first in the path: two processes that tokenize, a submitted job, a study, tasks."""
    first_in_path = environment(Path())
    options = ("--tokenizer", TOKENIZER, "--output", "prepared", "--processes", "2")
    document = {"text": "The patient has had a fever of three days. " * 100}
    (hostile / "text.jsonl").write_text((json.dumps(document) + "\n") * 300)  # enough for processes of their own
    command = (installed / "detour", "prepare", "text.jsonl", *options)
    prepared = run(*command, cwd=hostile, env=first_in_path)
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    (hostile / "prepared").rename(hostile / "shards")

    for name in ("train", "validation", "test"):
        rows = [{"text": f"Severe {ill} in the {name}.", "label": ill} for ill in ("fever", "cough", "asthma")]
        (hostile / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    task = {"name": "ills", "kind": "single", "score": "macro_f1", "columns": {"text": "text", "label": "label"}}
    task["files"] = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    write(hostile / "task.yaml", {**task, "protocol": {"preset": "english"}})
    study = {"name": "seeds", "recipe": "detour.yaml", "grid": {"data.seed": [1]}}
    write(hostile / "study.yaml", {**study, "held_out": {"shards": "held-out", "text": "test.jsonl"}})

    with LoopbackCluster(1, cpus=2, path=None, python=installed / "python") as cluster:
        submit = ("submit", "--working-dir", hostile, "--", installed / "detour-train")
        assert "toy is complete" in cluster.job(*submit, "--output", hostile / "job")
        assert complete(hostile / "job")
        with pytest.raises(subprocess.CalledProcessError) as refused:
            cluster.job(*submit, "--output", "runs/job")
        assert "Ray's copy" in refused.value.output and "--output" in refused.value.output

        env = cluster.environment | {"PYTHONPATH": "."}
        studied = run(installed / "detour", "study", "study.yaml", cwd=hostile, env=env)
        assert studied.returncode == 0, studied.stdout + studied.stderr
        (trial,) = (hostile / "runs/seeds/trials").glob("*/")
        assert complete(trial)
        protocol = ("epochs=1", "batch=4", "length=32")
        evaluated = run(
            *(installed / "detour", "evaluate", hostile / "job", "--task", "task.yaml", "--seeds", "1", *protocol),
            cwd=hostile,
            env=env,
        )
        assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
        assert (hostile / "evaluations/task/results.json").is_file()
