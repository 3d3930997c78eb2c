"""The wheel carries everything: installed into an empty environment, `detour-train` trains from any directory."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import yaml

from tests.launcher.toy import recipe, run

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "datapipe", "engine", "monitoring", "launcher", "studies")


def test_wheel_trains_from_any_directory(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build in the tree itself could pick up what an earlier one left
    source.mkdir()
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("detour_train-*.whl")

    empty = tmp_path / "venv"
    venv.create(empty, with_pip=False)
    installed = run(
        *pip,
        "--python",
        empty / "bin/python",
        "install",
        "--ignore-installed",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    assert installed.returncode == 0, installed.stderr
    (site,) = empty.glob("lib/python*/site-packages")
    # Only now, or pip would find the project installed. A .pth line adds our site-packages, with the dependencies,
    # but not what its own .pth files (this tree) add.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    away = tmp_path / "away"
    away.mkdir()
    listed = run(empty / "bin/detour", "recipes", cwd=away, path=None)
    assert "modernbert-base-bio-en" in listed.stdout, listed.stderr

    tree = recipe(Path("shards"), cluster={"workers_per_node": 1})
    tree["data"]["sources"][0]["text"] = "package://corpus/tico19_fr.jsonl.gz"
    (away / "detour.yaml").write_text(yaml.safe_dump(tree))
    trained = run(empty / "bin/detour-train", cwd=away, path=None)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (away / "runs/toy/hf/model.safetensors").is_file()
    assert (away / "runs/toy/report.html").is_file()
