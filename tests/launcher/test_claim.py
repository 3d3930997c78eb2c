"""The claim of a job on its run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import load_config
from launcher.claim import claim


def test_the_same_run_may_continue_elsewhere_and_otherwise_divided(tmp_path: Path) -> None:
    with claim(tmp_path / "run", load_config("demo")):
        pass
    changed = ["cluster.nodes=4", "parallel.tensor=2", "batch.micro=1", "monitoring.port=1234", "checkpoint.keep=9"]
    changed += ["data.on_error=skip", "data.backend=dali", "data.prefetch=9", "data.cache=c", "data.cache_gb=9"]
    changed += ["data.patience=9", "data.sources.0.shards=moved", "data.sources.0.text=moved.jsonl"]
    with claim(tmp_path / "run", load_config("demo", changed)):
        assert load_config(str(tmp_path / "run" / "config.yaml")) == load_config("demo", changed)


def test_another_run_is_refused_by_what_differs_and_nothing_is_touched(tmp_path: Path) -> None:
    with claim(tmp_path, load_config("demo", ["data.seed=7"])):
        pass
    with claim(tmp_path, load_config("demo")):  # a configuration that nothing was done with may be corrected
        (tmp_path / "events.jsonl").touch()
        before = (tmp_path / "config.yaml").read_bytes()
    with (
        pytest.raises(InputError) as refusal,
        claim(tmp_path, load_config("demo", ["data.seed=1", "optimizer.lr=0.1"])),
    ):
        pass
    assert (refusal.value.key, refusal.value.code) == ("--output", "output-of-another-run")
    assert "  data.seed: 42 -> 1\n  optimizer.lr: 0.003 -> 0.1\n" in str(refusal.value)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError) as refusal, claim(tmp_path, load_config("demo")):
        pass
    assert (refusal.value.key, refusal.value.code) == ("--output", "output-is-no-run")
    assert "thesis.tex" in str(refusal.value)


def test_one_job_at_a_time(tmp_path: Path) -> None:
    config = load_config("demo")
    with claim(tmp_path, config):
        with pytest.raises(InputError) as refusal, claim(tmp_path, config):
            pass
        assert (refusal.value.key, refusal.value.code) == ("--output", "output-in-use")
    with claim(tmp_path, config):
        pass


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as refusal, claim(tmp_path / "file" / "run", load_config("demo")):
        pass
    assert (refusal.value.key, refusal.value.code) == ("--output", "output-unwritable")


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error, claim(tmp_path / "r\udcff", load_config("demo")):
        pass
    assert error.value.code == "output-not-utf-8" and not list(tmp_path.iterdir())
