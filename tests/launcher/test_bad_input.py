"""Bad input through the real command: exit code 2, one message with key or file and remedy, nothing damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from tests.launcher.toy import DETOUR, TRAIN, recipe, run, write

Change = Callable[[dict[str, Any], Path], None]
"""Spoils a recipe, or the private copy of the shards that it names."""


def setting(**sections: Any) -> Change:
    def change(tree: dict[str, Any], shards: Path) -> None:
        tree.update(
            {
                key: {**tree.get(key, {}), **value} if isinstance(value, dict) else value
                for key, value in sections.items()
            }
        )

    return change


def first_phase(**keys: Any) -> Change:
    return lambda tree, shards: tree["phases"][0].update(keys)


def missing_shard(tree: dict[str, Any], shards: Path) -> None:
    (shards / "000000.tar").unlink()


def empty_shard(tree: dict[str, Any], shards: Path) -> None:
    (shards / "000000.tar").write_bytes(b"")


def truncated_shard(tree: dict[str, Any], shards: Path) -> None:
    path = shards / "000000.tar"
    path.write_bytes(path.read_bytes()[:-2000])


def other_tokenizer(tree: dict[str, Any], shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["tokenizer"] |= {"sha256": "0" * 64, "content_sha256": "0" * 64}
    (shards / "manifest.json").write_text(json.dumps(manifest))


def sources_that_end(tree: dict[str, Any], shards: Path) -> None:
    tree["data"]["sources"][0]["epochs"] = 1
    tree["phases"][0]["steps"] = 10**6


def other_architecture(tree: dict[str, Any], shards: Path) -> None:
    BertConfig().save_pretrained(shards.parent / "bert")
    tree["model"] = {"init": str(shards.parent / "bert")}


CASES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "misspelt key": (setting(optimizer={"learning_rate": 1e-3}), ("optimizer.learning_rate",)),
    "wrong type": (setting(seed="many"), ("seed",)),
    "length of zero": (first_phase(steps=0), ("phases.0.steps",)),
    "tensor parallel does not divide the heads": (
        setting(parallel={"tensor": 8}, cluster={"workers_per_node": 8}),
        ("parallel.tensor", "8", "4"),
    ),
    "pipeline does not divide the layers": (
        setting(parallel={"pipeline": 3}, cluster={"workers_per_node": 3}),
        ("parallel.pipeline", "3", "4"),
    ),
    "streams do not divide over the ranks": (setting(cluster={"workers_per_node": 3}), ("data.streams", "4", "3")),
    "workers are no multiple of tensor x pipeline": (
        setting(parallel={"tensor": 2}, cluster={"workers_per_node": 3}),
        ("cluster.workers_per_node", "3"),
    ),
    "more nodes than the cluster has": (setting(cluster={"nodes": 8}), ("cluster.nodes", "8", "RAY_ADDRESS")),
    "missing shard": (missing_shard, ("source en", "000000.tar", "detour prepare")),
    "empty shard": (empty_shard, ("source en", "000000.tar")),
    "truncated shard": (truncated_shard, ("source en", "000000.tar")),
    "no shards": (setting(data={"sources": [{"name": "en", "shards": "nowhere"}]}), ("source en", "nowhere")),
    "sources that end early": (sources_that_end, ("data.sources", "`epochs`", "512M")),
    "shards of another tokenizer": (other_tokenizer, ("source en", "tokenizer")),
    "token ids beyond the vocabulary": (setting(model={"vocab_size": 1000}), ("model.vocab_size", "1000")),
    "hub model of another architecture": (other_architecture, ("model.init", "'bert'")),
    "no such model": (setting(model={"init": "./nothing", "hidden_size": None}), ("model.init", "./nothing")),
    "no such tokenizer": (setting(tokenizer="./nothing"), ("tokenizer", "./nothing")),
    "fp8 without an fp8 GPU": (setting(precision="fp8"), ("precision", "precision=bf16")),
    "BF16 layers under delayed scaling": (
        setting(fp8_bf16_edges=True, fp8_recipe="delayed"),
        ("fp8_bf16_edges", "tensorwise"),
    ),
    "frozen layer beyond the last": (first_phase(freeze=[9]), ("phases.0.freeze", "9")),
}
"""Name -> change and the words of the message: the key or file at fault, its value, and the remedy's key."""
ALONE = ("more nodes than the cluster has", "fp8 without an fp8 GPU")
"""Cases of a process that belongs to no cluster."""


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest,
    toy_shards: Path,
    shared_cluster: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Any]]]:
    """Map each selected case to the command's answer; two run at a time, because they mostly import."""

    def answer(case: str) -> Any:
        home = tmp_path_factory.mktemp("bad")
        private = Path(shutil.copytree(toy_shards, home / "shards"))
        tree = recipe(private)
        CASES[case][0](tree, private)
        env = None if case in ALONE else shared_cluster
        return run(*TRAIN, write(home / "toy.yaml", tree), cwd=home, env=env)

    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    cases = [item.callspec.params["case"] for item in items if item.originalname == "test_bad_recipe"]
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(answer, case) for case in cases}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES)
def test_bad_recipe(case: str, answers: dict[str, Future[Any]]) -> None:
    refused(answers[case].result(), CASES[case][1])


def refused(result: Any, words: Iterable[str]) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stderr.count("error: ") == 1
    assert not [word for word in words if word not in result.stderr], result.stderr


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(run(*TRAIN, "demo", "--output", "file/run", cwd=tmp_path), ["--output", "file/run"])


def test_every_error_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    result = run(*TRAIN, "demo", "sead=1", "batch.sequences=0", "phases.1.mask_rate=2", cwd=tmp_path)
    refused(result, ["sead", "'seed'", "batch.sequences", "phases.1.mask_rate"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["inspect", "nothing"], "nothing"),
        (["export", "nothing", "out"], "nothing"),
        (["import", "./nothing", "out"], "./nothing"),
        (["merge", "./nothing", "./either", "--output", "out"], "./nothing"),
        (["study", "nothing"], "'nothing'"),
        (["prepare", "nothing.jsonl", "--tokenizer", "package://tokenizer/modernbert", "--output", "out"], "nothing"),
    ],
)
def test_other_commands(arguments: list[str], word: str, tmp_path: Path) -> None:
    refused(run(*DETOUR, *arguments, cwd=tmp_path), [word])
    assert not (tmp_path / "out").exists()
