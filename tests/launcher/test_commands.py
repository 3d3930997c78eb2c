"""Every command, started through the command line. Those that need Ray share one cluster."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from configs.load import RECIPES, dump_config, load_config, shipped
from launcher.cli import app
from launcher.exits import BAD_INPUT
from tests.launcher.toy import DETOUR, TRAIN, environment, recipe, run, started, wait_for, write

Start = Callable[..., Result]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a command in this process, in an empty working directory; it must succeed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words: str | Path) -> Result:
        result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return invoke


@pytest.mark.parametrize("command", [DETOUR, TRAIN])
def test_version(command: list[str], tmp_path: Path) -> None:
    result = run(*command, "--version", cwd=tmp_path)
    assert result.returncode == 0
    versions = {name: metadata.version(name) for name in ("detour-train", "torch", "megatron-core", "ray")}
    assert result.stdout.startswith(f"detour-train {versions.pop('detour-train')} ")
    assert all(f"{name} {version}" in result.stdout for name, version in versions.items())


def test_every_command_is_started_by_a_test() -> None:
    """`train` and `study` have tests of their own: test_end_to_end and tests/studies, and both in test_bad_input."""
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    commands = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
    assert commands - tested == {"train", "study"}


def test_an_option_may_name_the_home_directory_after_its_equals_sign(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump_config(load_config("demo")))
    home = {**environment(), "HOME": str(tmp_path / "home")}
    result = run(*DETOUR, "compare", "a", "b", "--output=~/page.html", cwd=tmp_path, env=home)
    assert result.returncode == 0 and (tmp_path / "home" / "page.html").is_file()


def test_a_file_name_that_is_not_utf_8_is_bad_input(tmp_path: Path) -> None:
    for name in ("a", "b\udcff"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump_config(load_config("demo")))
    result = run(*DETOUR, "compare", "a", "b\udcff", cwd=tmp_path)
    assert result.returncode == BAD_INPUT and result.stderr.startswith("error: ...") and "b\\udcff" in result.stderr


def test_recipes(start: Start) -> None:
    output = start("recipes").output
    assert [line.split()[0] for line in output.splitlines()] == list(shipped(RECIPES))


def test_schema(start: Start) -> None:
    assert json.loads(start("schema").output)["properties"].keys() >= {"model", "data", "phases", "cluster"}


def test_prepare(start: Start, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "A fever of three days."}\n' * 3)
    options = ("--tokenizer", "package://tokenizer/modernbert", "--output", "out", "--dedup")
    output = start("prepare", "text.jsonl", *options).output
    assert re.search(r"^out: 1 documents, \d+ tokens in 1 shards, \S+B on disk$", output, re.MULTILINE)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_inspect(start: Start, undisturbed: Path, toy_shards: Path) -> None:
    assert "9 of 9, complete" in start("inspect", undisturbed).output
    assert "every sha256 is right" in start("inspect", undisturbed / "checkpoints/step-00000009").output
    assert str(toy_shards) in start("inspect", toy_shards).output


def test_monitor(start: Start, undisturbed: Path) -> None:
    output = start("monitor", undisturbed, "--once", "--prometheus", "http://127.0.0.1:9").output
    assert "toy" in output and "9" in output


def test_compare(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    output = start("compare", undisturbed, undisturbed, "--output", "page.html").output
    assert "page.html" in output and "toy" in output
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_export(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    assert "step 9" in start("export", undisturbed, "model").output
    exported = (tmp_path / "model/model.safetensors").read_bytes()
    assert exported == (undisturbed / "hf/model.safetensors").read_bytes()


def test_import(undisturbed: Path, tmp_path: Path) -> None:
    """In a process of its own, because it opens process groups."""
    result = run(*DETOUR, "import", undisturbed / "hf", "start", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "model.init=start" in result.stdout
    assert json.loads((tmp_path / "start/detour.json").read_text())["step"] == 0


def test_merge(undisturbed: Path, tmp_path: Path) -> None:
    """In a process of its own, because it opens process groups."""
    options = ("--steps", "2", "--weights", "1-sqrt", "--output", "merged")
    result = run(*DETOUR, "merge", undisturbed, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "0.707107" in result.stdout and "model.init=merged/checkpoint" in result.stdout
    assert (tmp_path / "merged/hf/model.safetensors").is_file()
    again = run(*DETOUR, "merge", undisturbed, *options, cwd=tmp_path)
    assert again.returncode == BAD_INPUT and "--output" in again.stderr


def test_plan(tmp_path: Path) -> None:
    result = run(*DETOUR, "plan", "one-gpu-evening", "cluster.gpus_per_node=8", "--nodes", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "8 GPUs" in result.stdout and " GB" in result.stdout and "tokens/s" in result.stdout


def test_audit(undisturbed: Path, tmp_path: Path) -> None:
    """A run without canaries is refused; tests/studies/test_audit.py has the measurement."""
    result = run(*DETOUR, "audit", undisturbed, cwd=tmp_path)
    assert result.returncode == BAD_INPUT
    assert "--canaries" in result.stderr


def test_drift(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    output = start("drift", undisturbed, undisturbed, "--output", "out", "--count", "4").output
    assert "cka" in output
    rows = json.loads((tmp_path / "out/drift.json").read_text())
    assert [row["cka"] for row in rows] == pytest.approx([1.0] * len(rows))


def test_profile(toy_shards: Path, tmp_path: Path) -> None:
    """In a process of its own, because it opens process groups."""
    tree = recipe(toy_shards, cluster={"workers_per_node": 1})
    result = run(*DETOUR, "profile", write(tmp_path / "toy.yaml", tree), "--steps", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "forward and backward" in result.stdout
    assert json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]


def test_targets(tmp_path: Path) -> None:
    command = [*DETOUR, "targets", tmp_path, "--port", "0"]
    with started(*command, cwd=tmp_path) as server:
        output = tmp_path / "output.txt"
        url = wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+/", output.read_text()), server)[0]
        assert json.loads(urllib.request.urlopen(url, timeout=10).read()) == []


def test_doctor(shared_cluster: dict[str, str], tmp_path: Path) -> None:
    """Whether anything is to fix depends on the machine; every check has its line, and none raises."""
    result = run(*DETOUR, "doctor", cwd=tmp_path, env=shared_cluster)
    assert result.returncode in (0, 1), result.stderr
    assert "Traceback" not in result.stderr
    subjects = {line.split()[1] for line in result.stdout.splitlines() if line.startswith(("ok ", "FIX"))}
    assert subjects >= {"versions", "devices", "precision", "fp8", "attention", "memory", "ray", "shards"}
    assert re.search(r"^ok  ray +cluster at \S+, 1 node, 2 CPUs", result.stdout, re.MULTILINE), result.stdout


def test_evaluate(shared_cluster: dict[str, str], undisturbed: Path, tmp_path: Path) -> None:
    ills = ("fever", "cough", "asthma", "anaemia")
    write_task(tmp_path, ills)
    words = ("evaluate", undisturbed, "--task", "ills.yaml", "--seeds", "2", "epochs=1", "batch=4", "length=32")
    result = run(*DETOUR, *words, cwd=tmp_path, env=shared_cluster)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "macro_f1 on test" in result.stdout and "95 % interval" in result.stdout
    assert (tmp_path / "evaluations/ills/results.json").is_file()


def write_task(folder: Path, ills: Sequence[str]) -> None:
    """Write a task of four classes: ills.yaml and its three files."""
    for name, count, word in (("train", 5, "Severe"), ("validation", 2, "Mild"), ("test", 2, "Some")):
        rows = [json.dumps({"text": f"{word} {ill} is seen.", "label": ill}) for ill in ills]
        (folder / f"{name}.jsonl").write_text("\n".join(rows * count) + "\n")
    task = {"name": "ills", "kind": "single", "score": "macro_f1", "columns": {"text": "text", "label": "label"}}
    task["files"] = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    write(folder / "ills.yaml", {**task, "protocol": {"preset": "english"}})


def test_probe(undisturbed: Path, tmp_path: Path) -> None:
    write_task(tmp_path, ("fever", "cough", "asthma", "anaemia"))
    words = ("probe", undisturbed, "--task", "ills.yaml", "--processes", "1", "length=32")
    result = run(*DETOUR, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "probes/ills/probe.json").is_file()


def test_transplant(undisturbed: Path, tmp_path: Path) -> None:
    words = ("transplant", undisturbed, undisturbed / "hf", "--layers", "0-1", "--output", "both")
    result = run(*DETOUR, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "both/model.safetensors").is_file()


def test_nodes_is_a_number_that_overrides_the_recipe(tmp_path: Path) -> None:
    assert run(*TRAIN, "demo", "--nodes", "0", cwd=tmp_path).returncode == BAD_INPUT
    result = run(*TRAIN, "demo", "cluster.nodes=1", "--nodes", "8", cwd=tmp_path)
    assert result.returncode == BAD_INPUT
    assert "cluster.nodes" in result.stderr and "8" in result.stderr
    assert environment().get("RAY_ADDRESS") is None, "the run is in no cluster, so it asks for one at once"
