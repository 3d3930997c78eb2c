"""Checkpoints copied to an S3 server, and a run that resumes from them on an empty disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from monitoring.log import read_events, read_metrics
from tests.engine.world import run_world, stored, toy_config, train


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for key, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }.items():
        monkeypatch.setenv(key, value)
    boto3.client("s3").create_bucket(Bucket="runs")
    yield "runs"
    server.stop()


def test_a_run_resumes_from_its_mirror(bucket: str, shards: Path, alone_run: Path, tmp_path: Path) -> None:
    config = toy_config(shards, checkpoint={"every": "1 steps", "keep": 2, "mirror": f"s3://{bucket}/toy"})
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    run_world(1, train, config, first, 4)
    keys = [entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket=bucket)["Contents"]]
    assert {key.split("/")[2] for key in keys if key.startswith("toy/toy/step-")} == {"step-00000003", "step-00000004"}
    assert {"toy/toy/metrics.jsonl", "toy/toy/events.jsonl"} < set(keys)
    run_world(1, train, config, second)
    assert [line["step"] for line in read_metrics(second)] == [1, 2, 3, 4, 5]
    final, expected = stored(second, 5), stored(alone_run, 5)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final.items())

    other = toy_config(shards, checkpoint={"mirror": f"s3://{bucket}/toy"}, optimizer={"lr": 1.0})
    third = tmp_path / "third"
    third.mkdir()
    with pytest.raises(AssertionError, match=r"toy/toy holds a different run\n  optimizer.lr: 0.0002 -> 1.0"):
        run_world(1, train, other, third)


def test_a_damaged_checkpoint_is_replaced_from_the_mirror(
    bucket: str, shards: Path, alone_run: Path, tmp_path: Path
) -> None:
    config = toy_config(shards, checkpoint={"every": "1 steps", "keep": 2, "mirror": f"s3://{bucket}/damaged"})
    run_world(1, train, config, tmp_path, 4)
    for path in (tmp_path / "checkpoints").glob("step-*/*.distcp"):
        path.write_bytes(path.read_bytes()[:-1])
    run_world(1, train, config, tmp_path)
    resumed = [event["step"] for event in read_events(tmp_path) if event["event"] == "resumed"]
    assert resumed == [4]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [
        ".step-00000003.damaged",
        ".step-00000004.damaged",
        "step-00000004",
        "step-00000005",
    ]
    final, expected = stored(tmp_path, 5), stored(alone_run, 5)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final.items())


def test_a_store_that_is_down_leaves_the_checkpoints_here(
    bucket: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(shards, checkpoint={"every": "1 steps", "mirror": f"s3://{bucket}/down"})
    run_world(1, train, config, tmp_path, 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    (outcome,) = run_world(1, train, config, tmp_path)
    assert outcome.finished
    assert any("does not answer" in event.get("reason", "") for event in read_events(tmp_path))


def test_a_mirror_that_is_gone_does_not_stop_the_training(
    bucket: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(shards, checkpoint={"every": "1 steps", "mirror": f"s3://{bucket}/toy"})
    missing = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"mirror": str(tmp_path / "file" / "x")})}
    )
    (tmp_path / "file").write_text("a file where a directory is needed")
    (outcome,) = run_world(1, train, missing, tmp_path)
    assert outcome.finished
    failed = [event for event in read_events(tmp_path) if event["event"] == "checkpoint_failed"]
    assert failed and failed[0]["reason"].startswith("mirror: ")
