"""The deployment files, as far as they can be tested without a cloud, Kubernetes or Slurm."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.scripts.scripts import cli as ray_cli

from configs.load import load_config
from tests.launcher.toy import environment, events, started, steps, wait_for

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def check_command(command: str) -> str:
    """A `detour-train` command names a recipe that resolves with its overrides. Returns the directory it runs in."""
    env, chdir, *words = shlex.split(command)
    home = chdir.removeprefix("--chdir=")
    assert env == "env" and words[0] == "detour-train"
    config = load_config(words[1], [word for word in words[2:] if "=" in word])
    assert not any(source.shards.startswith("/") for source in config.data.sources), (
        "the shards lie under the directory"
    )
    assert words[words.index("--output") + 1].startswith(f"{home}/"), (
        "where all nodes see it, and not in Ray's copy of the job"
    )
    return home


def test_ray_cluster_starts_with_a_token_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.authentication.authentication_token_setup import _get_default_token_path
    from ray.autoscaler._private.docker import docker_start_cmds
    from ray.autoscaler._private.util import fillout_defaults, hash_runtime_conf, validate_config

    text = (DEPLOY / "ray-cluster.yaml").read_text()
    monkeypatch.setenv("HOME", str(tmp_path))
    (generate,) = re.findall(r"^#   (ray get-auth-token --generate)", text, re.MULTILINE)
    ray = [sys.executable, "-m", "ray.scripts.scripts", *generate.split()[1:]]
    subprocess.run(ray, env=environment() | {"HOME": str(tmp_path)}, check=True, timeout=120)
    config = fillout_defaults(yaml.safe_load(text))
    validate_config(config)
    ((there, here),) = config["file_mounts"].items()
    assert Path(there).expanduser() == Path(here).expanduser() == _get_default_token_path()
    hash_runtime_conf(config["file_mounts"], [], [])  # reads what it mounts
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (home,) = re.findall(r"^ENV HOME=(\S+)$", dockerfile, re.MULTILINE)
    start = docker_start_cmds("ubuntu", "detour", config["file_mounts"], "detour", [], "detour", home, "docker")
    assert f":{home}/.ray/auth_token " in start, "where the image's user looks"
    assert f"USER 1001:1001\nWORKDIR {home}" in dockerfile and " rsync " in dockerfile
    assert all("ImageId" in node["node_config"] for node in config["available_node_types"].values())
    for start in config["head_start_ray_commands"][1:] + config["worker_start_ray_commands"][1:]:
        assert start.startswith("RAY_AUTH_MODE=token ")
    head, gpu = (config["available_node_types"][name]["resources"] for name in (config["head_node_type"], "gpu"))
    assert head["CPU"] == 0
    command = re.findall(r"ray job submit .* -- ((?:.*\n)*?.*)$", text.replace("\\\n# ", ""), re.MULTILINE)[0].split(
        "#"
    )[0]
    assert f"-v {check_command(command)}:" in " ".join(config["docker"]["run_options"])
    assert f"cluster.gpus_per_node={gpu['GPU']}" in command


def load_job(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a RayJob and its only group of workers, and check what both manifests share."""
    job = next(one for one in yaml.safe_load_all((DEPLOY / name).read_text()) if one["kind"] == "RayJob")
    assert job["spec"]["backoffLimit"] == 0, "KubeRay would retry bad input"
    home = check_command(job["spec"]["entrypoint"])
    words = job["spec"]["entrypoint"].split()
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == int(words[words.index("--nodes") + 1])
    for spec in (job["spec"]["rayClusterSpec"]["headGroupSpec"], group):
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        assert f"--uid {pod['securityContext']['fsGroup']} " in (DEPLOY / "Dockerfile").read_text()
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert home in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    return job, group


def test_kind_runs_the_image_and_the_claim_of_its_quick_start() -> None:
    claim, job = yaml.safe_load_all((DEPLOY / "kind.yaml").read_text())
    _, group = load_job("kind.yaml")
    pod = group["template"]["spec"]
    assert claim["metadata"]["name"] == pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert f"kind load docker-image {pod['containers'][0]['image']}\n" in page
    assert f"rayjob/{job['metadata']['name']} " in page and "/data/runs/demo" in job["spec"]["entrypoint"]
    build = re.findall(r"docker build (--build-arg (?:.*\\\n)+.*)", page)[0]
    arguments = set(re.findall(r"--build-arg (\w+)=", build))
    assert arguments <= set(re.findall(r"^ARG (\w+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))


def test_rayjob_tells_a_pod_that_it_will_be_deleted() -> None:
    job, group = load_job("rayjob.yaml")
    assert job["spec"]["submissionMode"] == "K8sJobMode" and job["spec"]["submitterConfig"]["backoffLimit"] > 0
    pod = group["template"]["spec"]
    notice = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    deadline, pause = (int(re.findall(pattern, notice)[0]) for pattern in (r"seconds=(\d+)", r"sleep (\d+)"))
    assert pause < deadline < pod["terminationGracePeriodSeconds"]
    drain = shlex.split(notice.split("&&")[0])[1:]
    (name, *options) = drain
    ray_command = ray_cli.commands[name]
    assert not ray_command.make_parser(click.Context(ray_command)).parse_args(options)[1], "Ray knows every option"


def test_docker_copies_no_more_than_an_image_needs() -> None:
    """And the image can read the shards of the other files: from object stores too."""
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "runs", "shards"} < set(left_out)
    sources = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert not {source.rstrip("*") for source in sources} & set(left_out)
    extras = re.findall(r"EXTRA=\[(.*?)\]", (DEPLOY / "Dockerfile").read_text())
    assert len(extras) == 2 and all("remote" in extra.split(",") for extra in extras)


@pytest.mark.chaos
def test_slurm_script_trains_and_requeues_itself_when_stopped(undisturbed: Path, tmp_path: Path) -> None:
    """The real script with Slurm's commands replaced by ones that act on this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    skip_options = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    for name, body in {
        "srun": f"[[ $SRUN_CPUS_PER_TASK == 2 ]] || exit 1; {skip_options}",
        "scontrol": f'if [[ $1 == show ]]; then echo localhost; else echo "$@" > {tmp_path}/requeued; fi',
        "python": "echo 127.0.0.11",  # asked for this node's address
    }.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    here = environment() | {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "2",
    }
    script: list[str | Path] = [
        "bash",
        DEPLOY / "slurm.sh",
        undisturbed.parent / "toy.yaml",
        "--output",
        tmp_path / "run",
    ]
    with started(*script, cwd=tmp_path, env=here) as job:
        wait_for(lambda: 2 in steps(tmp_path / "run"), job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(200) == 75, (tmp_path / "output.txt").read_text()
        assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert events(tmp_path / "run")[-2:] == ["checkpoint_saved", "stopped"]
    port = str(20000 + os.getpid() % 20000)
    left = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in left if any(f"port={port}" in word for word in words)], "Ray is left behind"


@pytest.mark.parametrize("code", [0, 2, 3, 75])
@pytest.mark.parametrize("ray", ["exit 0", "exec sleep 300"])
def test_slurm_script_ends_with_the_code_of_the_run_though_ray_is_gone(tmp_path: Path, code: int, ray: str) -> None:
    """Every command is replaced, because only the script's own logic is at stake."""
    commands = tmp_path / "bin"
    commands.mkdir()
    skip_options = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    for name, body in {
        "srun": skip_options,
        "scontrol": f'if [[ $1 == show ]]; then echo localhost; else echo "$@" > {tmp_path}/requeued; fi',
        "python": "echo 127.0.0.1",
        "ray": f"if [[ $1 == start ]]; then {ray}; fi",
        "detour-train": f"sleep 0.3; exit {code}",
    }.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    slurm = {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
    ended = subprocess.run(["bash", DEPLOY / "slurm.sh", "demo"], env=slurm, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "requeued").exists() == (code == 75)


def test_workflow_runs_the_whole_check() -> None:
    workflow = yaml.load((ROOT / ".github" / "workflows" / "ci.yml").read_text(), yaml.BaseLoader)  # `on` is no boolean
    assert {"push", "pull_request"} <= set(workflow["on"])
    (job,) = workflow["jobs"].values()
    (python,) = [
        step["with"]["python-version"].split() for step in job["steps"] if "setup-python" in step.get("uses", "")
    ]
    assert python == ["3.12", "3.11"], "the last one is `python3`"
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    assert os.access(ROOT / command, os.X_OK)
    assert "make test" in (ROOT / command).read_text()
    limit = int(re.findall(r"limit=\$\(\((\d+) \* 60\)\)", (ROOT / command).read_text())[0])
    assert limit < int(job["timeout-minutes"])


@pytest.mark.parametrize(("name", "python"), [("cpu", "3.11"), ("gpu", "3.12")])
def test_constraints_are_versions_that_the_project_allows(name: str, python: str) -> None:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(one.marker) == f'python_version == "{python}"' for one in pinned)
    versions = {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [
        Requirement(line)
        for lines in (project["dependencies"], *project["optional-dependencies"].values())
        for line in lines
    ]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"python_version": python})]
    checked = [one for one in needed if canonicalize_name(one.name) in versions]
    assert len(checked) > 5
    assert not [str(one) for one in checked if not one.specifier.contains(versions[canonicalize_name(one.name)])]


def test_what_is_installed_takes_the_constraints() -> None:
    assert "--constraint $(CONSTRAINTS)" in (ROOT / "Makefile").read_text()
    installs = re.findall(r"pip install (?!setuptools)[^&\n]*", (DEPLOY / "Dockerfile").read_text())
    assert len(installs) == 2 and all("--constraint constraints/gpu.txt" in install for install in installs)
