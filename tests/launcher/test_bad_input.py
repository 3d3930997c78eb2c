"""Bad input through the real command: exit code 2, one message with key or file and remedy, nothing damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
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
    manifest["tokenizer"]["sha256"] = "0" * 64
    (shards / "manifest.json").write_text(json.dumps(manifest))


def sources_that_end(tree: dict[str, Any], shards: Path) -> None:
    tree["data"]["sources"][0]["epochs"] = 1
    tree["phases"][0]["steps"] = 10**6


def other_architecture(tree: dict[str, Any], shards: Path) -> None:
    BertConfig().save_pretrained(shards.parent / "bert")
    tree["model"] = {"init": str(shards.parent / "bert")}


CASES: dict[str, tuple[Change, str]] = {
    "misspelt key": (setting(optimizer={"learning_rate": 1e-3}), r"optimizer\.learning_rate: no such key"),
    "wrong type": (setting(seed="many"), r"seed: .*integer"),
    "length of zero": (first_phase(steps=0), r"phases\.0\.steps: .*greater than 0"),
    "tensor parallel does not divide the heads": (
        setting(parallel={"tensor": 8}, cluster={"workers_per_node": 8}),
        r"parallel\.tensor: 8 does not divide the model's 4 attention heads",
    ),
    "pipeline does not divide the layers": (
        setting(parallel={"pipeline": 3}, cluster={"workers_per_node": 3}),
        r"parallel\.pipeline: 3 does not divide the model's 4 layers",
    ),
    "streams do not divide over the ranks": (setting(cluster={"workers_per_node": 3}), r"data\.streams: 4 .*3 data"),
    "workers are no multiple of tensor x pipeline": (
        setting(parallel={"tensor": 2}, cluster={"workers_per_node": 3}),
        r"cluster\.workers_per_node: 3 workers",
    ),
    "more nodes than the cluster has": (
        setting(cluster={"nodes": 8}),
        r"cluster\.nodes: asked for 8 nodes.*RAY_ADDRESS",
    ),
    "missing shard": (missing_shard, r"source en: .*000000\.tar is missing; .*detour prepare"),
    "empty shard": (empty_shard, r"source en: .*000000\.tar is empty"),
    "truncated shard": (truncated_shard, r"source en: .*000000\.tar is truncated"),
    "no shards": (setting(data={"sources": [{"name": "en", "shards": "nowhere"}]}), r"source en: .*nowhere"),
    "sources that end early": (
        sources_that_end,
        r"data\.sources: all reach their `epochs` after .* tokens, at most [\d,]+ of the 1,000,003 steps; shorten",
    ),
    "shards of another tokenizer": (other_tokenizer, r"source en: .*tokenizer"),
    "token ids beyond the vocabulary": (setting(model={"vocab_size": 1000}), r"model\.vocab_size: 1000"),
    "hub model of another architecture": (other_architecture, r"model\.init: .*'bert'"),
    "no such model": (
        setting(model={"init": "./nothing", "hidden_size": None}),
        r"model\.init: no directory \./nothing",
    ),
    "no such tokenizer": (setting(tokenizer="./nothing"), r"tokenizer \./nothing"),
    "fp8 without an fp8 GPU": (setting(precision="fp8"), r"precision: fp8 needs .*precision=bf16"),
    "BF16 layers under delayed scaling": (
        setting(fp8_bf16_edges=True, fp8_recipe="delayed"),
        r"fp8_bf16_edges: .*use tensorwise",
    ),
    "frozen layer beyond the last": (first_phase(freeze=[9]), r"phases\.0\.freeze: no layers \[9\]"),
}


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Any]]]:
    """What the command says in each of the cases asked for; two run at a time, since most of each is importing."""

    def answer(case: str) -> Any:
        home = tmp_path_factory.mktemp("bad")
        private = Path(shutil.copytree(toy_shards, home / "shards"))
        tree = recipe(private)
        CASES[case][0](tree, private)
        return run(*TRAIN, write(home / "toy.yaml", tree), cwd=home)

    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    cases = [item.callspec.params["case"] for item in items if item.originalname == "test_bad_recipe"]
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(answer, case) for case in cases}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES)
def test_bad_recipe(case: str, answers: dict[str, Future[Any]]) -> None:
    refused(answers[case].result(), CASES[case][1])


def refused(result: Any, message: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stderr.count("error: ") == 1
    assert re.search(message, result.stderr, re.DOTALL), result.stderr


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(run(*TRAIN, "demo", "--output", "file/run", cwd=tmp_path), r"--output .*file/run cannot be written")


def test_every_error_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    result = run(*TRAIN, "demo", "sead=1", "batch.sequences=0", "phases.1.mask_rate=2", cwd=tmp_path)
    refused(result, r"3 errors.*phases\.1\.mask_rate.*|.*sead: no such key; did you mean 'seed'")
    assert all(key in result.stderr for key in ("sead", "batch.sequences", "phases.1.mask_rate"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nothing"], r"nothing"),
        (["export", "nothing", "out"], r"nothing"),
        (["import", "./nothing", "out"], r"no directory \./nothing"),
        (["prepare", "nothing.jsonl", "--tokenizer", "package://tokenizer/modernbert", "--output", "out"], r"nothing"),
    ],
)
def test_other_commands(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused(run(*DETOUR, *arguments, cwd=tmp_path), message)
    assert not (tmp_path / "out").exists()
