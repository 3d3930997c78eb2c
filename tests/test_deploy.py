"""The deployment files, as far as they can be tested without a cloud, Kubernetes or Slurm."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

import psutil
import yaml

from configs.load import load_config
from tests.launcher.toy import environment, events, started, steps, wait_for

DEPLOY = Path(__file__).parents[1] / "deploy"


def check_command(command: str) -> None:
    """A `detour-train` command names a recipe that resolves with its overrides."""
    words = shlex.split(command)
    assert words[0] == "detour-train"
    load_config(words[1], [word for word in words[2:] if "=" in word])


def test_ray_cluster_file_is_what_ray_expects() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    validate_config(fillout_defaults(config))
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0


def test_rayjob_runs_a_recipe_on_the_nodes_it_asks_for() -> None:
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check_command(job["spec"]["entrypoint"])
    words = job["spec"]["entrypoint"].split()
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == int(words[words.index("--nodes") + 1])
    for spec in (job["spec"]["rayClusterSpec"]["headGroupSpec"], group):
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert any(entry["name"] == "RAY_AUTH_TOKEN" for entry in container["env"])


def test_slurm_script_trains_and_requeues_itself_when_stopped(undisturbed: Path, tmp_path: Path) -> None:
    """The real script with Slurm's commands replaced by ones that act on this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    skip_options = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    for name, body in {
        "srun": skip_options,
        "scontrol": f'if [[ $1 == show ]]; then echo localhost; else echo "$@" > {tmp_path}/requeued; fi',
        "hostname": "echo 127.0.0.11",
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
