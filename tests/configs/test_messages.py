"""Messages for wrong values: one per key, with what the key takes and what it was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import RECIPES, changes_of_run, load_config, shipped

DEMO = shipped(RECIPES)["demo"]


def refusal(*overrides: str) -> InputError:
    with pytest.raises(InputError) as error:
        load_config("demo", overrides)
    return error.value


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("phases=[]", "phases", "needs at least 1 entry, got []"),
        ("phases=null", "phases", "has no value"),
        ("cluster.nodes=0", "cluster.nodes", "must be greater than 0, got 0"),
        ("cluster.nodes=[2]", "cluster.nodes", "expected integer or [integer, integer], got [2]"),
        ("cluster.nodes=[1,2,3]", "cluster.nodes", "takes at most 2 entries"),
        ("cluster.workers_per_node=all", "cluster.workers_per_node", "expected integer or `auto`, got 'all'"),
        ("phases.0.batch.micro=0", "phases.0.batch.micro", "must be greater than 0, got 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas", "expected [number, number], got [0.9]"),
        ("batch.sequences=", "batch.sequences", "has no value; expected integer, or remove the key"),
        ("phases.0.lr=3e-4", "phases.0.lr", "expected a mapping of keys such as peak, warmup, shape, final"),
        ("precision=16", "precision", "expected one of `auto`, `fp32`, `bf16`, `fp8`, got 16"),
        ("checkpoint.every=5steps", "checkpoint.every", "got '5steps'"),
        ("name=yes", "name", "expected text, got True; YAML reads yes"),
    ],
)
def test_a_wrong_value_has_one_message(override: str, key: str, message: str) -> None:
    error = refusal(override)
    assert error.key == key and f": 1 error\n  {key}: " in str(error) and message in str(error)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=true", "seed"),
        ("batch.sequences=on", "batch.sequences"),
        ("phases.0.freeze=[true]", "phases.0.freeze.0"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("optimizer.lr=1e400", "optimizer.lr"),
        ("phases.1.mask_split=[.nan,0.1,0.1]", "phases.1.mask_split.0"),
        ("data.sources.0.weight=.inf", "data.sources.0.weight"),
        ("model.pad_token_id=-5", "model.pad_token_id"),
        ("phases.0.tokens=.inf", "phases.0.tokens"),
        ("checkpoint.every=.inf", "checkpoint.every"),
        ("data.sequence_length=1", "data.sequence_length"),
        ("phases.1.sources={medquad: .inf}", "phases.1.sources.medquad"),
    ],
)
def test_values_that_no_run_can_have(override: str, key: str) -> None:
    assert refusal(override).key == key


@pytest.mark.parametrize("init", ["5", "[a]", "null", "true"])
def test_a_wrong_model_is_no_fault_of_the_tokenizer_that_follows_from_it(init: str) -> None:
    with pytest.raises(InputError) as error:
        load_config("one-gpu-evening", [f"model.init={init}"])
    assert error.value.key == "model.init" and ": 1 error\n" in str(error.value)


@pytest.mark.parametrize("override", ["seed=010", "seed=12:30", "phases.0.steps=0100", "data.sources.0.weight=-012"])
def test_numbers_that_yaml_does_not_read_as_decimal_are_refused(override: str) -> None:
    assert refusal(override).code == "number-not-decimal"


@pytest.mark.parametrize(
    ("override", "value"), [("seed=1e9", 10**9), ("seed=1_000", 1000), ('seed="7"', 7), ("seed=0", 0), ("seed=10", 10)]
)
def test_other_spellings_of_numbers_are_taken(override: str, value: int) -> None:
    assert load_config("demo", [override]).seed == value


def test_entries_of_lists_are_not_numbered_from_the_end() -> None:
    for override in ("phases.-1.steps=5", "phases[-1].steps=5"):
        assert refusal(override).code == "override-malformed"


def test_contradictions_between_sections_are_reported_together() -> None:
    error = refusal("data.streams=3", "phases.0.sources={medquat: 1}", "phases.0.reset=[head]")
    assert error.key == "data.streams"
    assert all(f"\n  {key}: " in str(error) for key in ("phases.0.sources.medquat", "phases.0.reset"))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (DEMO.encode("utf-16"), "file-unreadable"),
        (DEMO.encode() + b"# caf\xe9\n", "file-unreadable"),
        (DEMO.encode() + b"\x00", "invalid-yaml"),
        (b"---\n" + DEMO.encode() + b"---\nname: other\n", "invalid-yaml"),
        (b"checkpoint:\n\tevery: 5 steps\n", "invalid-yaml"),
        (b"x: &a [*a]\n", "invalid-yaml"),
        (b"seed: 017\n", "number-not-decimal"),
        (b"5: a\n", "invalid-config"),
        (b"name: ${oc.env:NO_SUCH_VARIABLE_HERE}\n", "invalid-yaml"),
    ],
)
def test_files_that_are_refused(content: bytes, code: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(InputError) as error:
        load_config(str(tmp_path / "own.yaml"))
    assert error.value.code == code and "own.yaml" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf" + DEMO.encode(), DEMO.replace("\n", "\r\n").encode(), b"---\n" + DEMO.encode() + b"...\n"],
    ids=["byte order mark", "line ends of Windows", "document marks"],
)
def test_files_of_other_editors_are_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(content)
    assert load_config(str(tmp_path / "own.yaml")) == load_config("demo")


def test_the_micro_batch_of_a_phase_may_change_as_the_runs_may() -> None:
    before, after = load_config("demo"), load_config("demo", ["batch.micro=2", "phases.1.batch.micro=1"])
    assert changes_of_run(before, after) == []
    assert changes_of_run(before, load_config("demo", ["phases.1.batch.sequences=16"]))
