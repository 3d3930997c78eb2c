"""Nodes with other code are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.errors import InputError
from configs.versions import HOME, code_files, compared_versions, software
from launcher.same_code import check_same_code
from launcher.worker import WorkerInfo

FILE = "engine/step.py"


def worker(address: str) -> WorkerInfo:
    return WorkerInfo(address, address, (), dict(code_files()), compared_versions())


def test_equal_nodes_pass() -> None:
    check_same_code([worker("10.0.0.1"), worker("10.0.0.2")])
    assert FILE in code_files() and all((HOME / name).is_file() for name in code_files())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"files": code_files() | {FILE: "0" * 12}}, FILE),
        ({"files": {name: value for name, value in code_files().items() if name != FILE}}, FILE),
        ({"files": {}}, "missing"),
        ({"packages": compared_versions() | {"torch": "1.0"}}, "torch (1.0 instead of"),
    ],
)
def test_a_node_that_differs_is_refused_with_its_difference(change: dict[str, dict[str, str]], named: str) -> None:
    other = replace(worker("10.0.0.2"), **change)
    with pytest.raises(InputError) as refusal:
        check_same_code([worker("10.0.0.1"), other])
    assert (refusal.value.key, refusal.value.code) == ("cluster.nodes", "nodes-differ")
    assert "10.0.0.2" in str(refusal.value) and named in str(refusal.value)


def test_software_names_the_commit_and_the_packages() -> None:
    assert software().keys() == {"version", "commit", "code", "python", "torch", "megatron", "ray"}
    assert not [name for name, version in software().items() if version == "missing"]
    if (HOME / ".git").exists():
        assert len(software()["commit"].removesuffix("-dirty")) >= 12
