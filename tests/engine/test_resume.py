"""A stopped run resumes as if nothing had happened."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError
from configs.schema import RunConfig
from engine.build import build
from engine.checkpoint import describe, latest_valid, prune, step_directory, verify
from engine.trainer import train_loop
from monitoring.log import read_events, read_metrics
from tests.engine.world import run_world, stored, toy_config, train

TRAINED = ("step", "phase", "objective", "loss", "tokens", "learning_rate", "grad_norm", "packing_ratio")


def trained(directory: Path) -> list[dict[str, Any]]:
    """Return the logged lines without times, which differ between runs."""
    return [{key: line[key] for key in TRAINED} for line in read_metrics(directory)]


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_stopped_and_run_again_is_bit_identical(stop_after: int, shards: Path, alone_run: Path, tmp_path: Path) -> None:
    config = toy_config(shards)
    (first,) = run_world(1, train, config, tmp_path, stop_after)
    assert (first.step, first.finished, first.reason) == (stop_after, False, "test")
    (second,) = run_world(1, train, config, tmp_path)
    assert (second.step, second.finished) == (5, True)
    assert trained(tmp_path) == trained(alone_run)
    final, expected = stored(tmp_path, 5), stored(alone_run, 5)
    assert final.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final.items())


def test_bf16_resumes_bit_identical(shards: Path, tmp_path: Path) -> None:
    """A checkpoint holds the bf16 weights and the fp32 weights that the optimizer rounds them from."""
    # A small one: without AMX a CPU multiplies in bf16 very slowly.
    config = toy_config(shards, precision="bf16", data={"sequence_length": 64}, batch={"sequences": 4})
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for directory, stops in ((whole, (None,)), (stopped, (3, None))):
        directory.mkdir()
        for stop_after in stops:
            run_world(1, train, config, directory, stop_after)
    assert trained(stopped) == trained(whole)
    final, expected = stored(stopped, 5), stored(whole, 5)
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16, torch.float32}
    assert final.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final.items())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2)])
def test_resumed_at_another_data_parallel_size(
    before: int, after: int, shards: Path, alone_run: Path, tmp_path: Path
) -> None:
    run_world(before, train, toy_config(shards), tmp_path, 2)
    run_world(after, train, toy_config(shards), tmp_path)
    for found, expected in zip(trained(tmp_path), trained(alone_run), strict=True):
        assert found == {
            **expected,
            "loss": pytest.approx(expected["loss"], rel=1e-5),
            "grad_norm": pytest.approx(expected["grad_norm"], rel=1e-5),
        }
    final, expected_state = stored(tmp_path, 5), stored(alone_run, 5)
    assert all((tensor - expected_state[name]).abs().max() <= 1e-5 for name, tensor in final.items())


def test_saved_at_tp2_pp2_resumes_on_one_process(shards: Path, alone_run: Path, tmp_path: Path) -> None:
    run_world(4, train, toy_config(shards, parallel={"tensor": 2, "pipeline": 2}), tmp_path, 2)
    run_world(1, train, toy_config(shards), tmp_path)
    final, expected = stored(tmp_path, 5), stored(alone_run, 5)
    assert all((tensor - expected[name]).abs().max() <= 1e-5 for name, tensor in final.items())


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(shards: Path, alone_run: Path, tmp_path: Path) -> None:
    config = toy_config(shards, checkpoint={"every": "1 steps", "keep": 5})
    run_world(1, train, config, tmp_path, 4)
    newest, older = (step_directory(tmp_path / "checkpoints", step) for step in (4, 3))
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    found, damaged = latest_valid(tmp_path / "checkpoints")
    assert found == older
    assert len(damaged) == 1 and str(victim) in damaged[0]
    # It is set aside, because retention would otherwise delete what the run saves before that step.
    run_world(1, train, toy_config(shards, checkpoint={"every": "1 steps", "keep": 1}), tmp_path, 1)
    assert sorted(path.name for path in older.parent.iterdir()) == [
        ".step-00000004.damaged",
        "step-00000003",  # the end of a phase
        "step-00000004",
    ]
    run_world(1, train, config, tmp_path)
    assert trained(tmp_path) == trained(alone_run)
    (event,) = (event for event in read_events(tmp_path) if event["event"] == "checkpoint_damaged")
    assert victim.name in event["reason"]


def test_every_file_is_checked_by_one_of_the_processes_that_share_the_check(alone_run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000005"
    shutil.copytree(step_directory(alone_run / "checkpoints", 5), checkpoint)
    for name in describe(checkpoint).files:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1])
        refused = 0
        for part in range(3):
            try:
                verify(checkpoint, part, parts=3)
            except InputError as error:
                refused += name in str(error)
        assert refused == 1, name
        (checkpoint / name).write_bytes(content)


def test_a_checkpoint_of_another_model_size_is_refused(shards: Path, alone_run: Path) -> None:
    wider = toy_config(shards, model={"hidden_size": 64})
    with pytest.raises(AssertionError, match=r"holds a model of another size \(hidden_size 32 -> 64"):
        run_world(1, train, wider, alone_run)


def rewrite_meta(checkpoint: Path, **changes: Any) -> None:
    """Replace fields of detour.json; None removes one."""
    content = json.loads((checkpoint / "detour.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    (checkpoint / "detour.json").write_text(json.dumps(content))


def with_index(alone_run: Path, folder: Path, content: bytes) -> Path:
    """Copy the finished run's checkpoint with another index, and with that index's size and sha256."""
    checkpoint = folder / "checkpoints" / "step-00000005"
    shutil.copytree(step_directory(alone_run / "checkpoints", 5), checkpoint)
    (checkpoint / ".metadata").write_bytes(content)
    files = {**describe(checkpoint).files, ".metadata": (len(content), hashlib.sha256(content).hexdigest())}
    rewrite_meta(checkpoint, files=files)
    return checkpoint


def test_an_index_that_names_code_is_not_loaded(alone_run: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    with_index(alone_run, tmp_path, pickle.dumps(Evil()))
    found, damaged = latest_valid(tmp_path / "checkpoints")
    assert found is None
    assert "builtins.exec" in damaged[0] and "not trusted" in damaged[0]
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("module", ["torch.distributed.checkpoint.filesystem", "torch.distributed.checkpoint.metadata"])
def test_an_index_cannot_reach_code_through_a_module_it_needs(module: str, alone_run: Path, tmp_path: Path) -> None:
    """Protocol 4 resolves dotted names, so `filesystem`'s import of os would give access to os.mkdir."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    code = b"\x80\x04" + text(module) + text("os.mkdir") + b"\x93" + text(str(tmp_path / "owned")) + b"\x85R."
    with_index(alone_run, tmp_path, code)
    found, damaged = latest_valid(tmp_path / "checkpoints")
    assert found is None
    assert f"{module}.os.mkdir" in damaged[0] and "not trusted" in damaged[0]
    assert not (tmp_path / "owned").exists()


def test_an_index_names_no_code_where_python_pickles_enumerations_by_name(
    alone_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11.0 to 3.11.3 pickles them by `builtins.getattr`, which is not trusted. Debian 12 has 3.11.2."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    from engine.megatron.torch_index import _pickled

    index = pickle.loads((step_directory(alone_run / "checkpoints", 5) / ".metadata").read_bytes())
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    assert b"getattr" in pickle.dumps(index)
    assert b"getattr" not in _pickled(index)


def test_an_index_that_calls_a_weight_a_pickle_is_not_loaded(alone_run: Path, tmp_path: Path) -> None:
    """Torch's planner would unpickle such an entry without restriction."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = pickle.loads((step_directory(alone_run / "checkpoints", 5) / ".metadata").read_bytes())
    index.state_dict_metadata["decoder.final_layernorm.weight"] = BytesStorageMetadata()
    checkpoint = with_index(alone_run, tmp_path, pickle.dumps(index))
    with pytest.raises(InputError, match=r"decoder\.final_layernorm\.weight is no tensor: it is not trusted"):
        verify(checkpoint)


def train_with_a_fast_clock(config: RunConfig, directory: Path) -> Any:
    """Train; the clock of the checkpoints is 25 seconds later each time that it is read."""
    with closing(build(config, directory)) as run:
        run.checkpoints.clock, run.state.saved_at = itertools.count(25, 25).__next__, 0.0
        return train_loop(run)


def test_checkpoints_by_the_minute(shards: Path, tmp_path: Path) -> None:
    """The rank that decides reads the clock once per step, and once as a save begins."""
    config = toy_config(shards, phases=[{"objective": "clm", "steps": 8}], checkpoint={"every": "1 minutes"})
    run_world(2, train_with_a_fast_clock, config, tmp_path)
    saved = [event["step"] for event in read_events(tmp_path) if event["event"] == "checkpoint_saved"]
    assert saved == [3, 6, 8]


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    """Multiples of `keep_every` and the ends of phases stay besides the newest."""
    phases = [{"objective": "clm", "steps": 5}, {"objective": "mlm", "steps": 9}]
    config = toy_config(tmp_path, phases=phases, checkpoint={"keep": 1, "keep_every": 4})
    for step in range(1, 11):
        step_directory(tmp_path, step).mkdir()
    (tmp_path / ".step-00000011.partial").mkdir()
    prune(tmp_path, config)
    assert sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()) == [4, 5, 8, 10]


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)) as error:
        describe(tmp_path)
    assert error.value.code == "not-a-checkpoint"


def test_a_checkpoint_of_an_earlier_version_resumes(shards: Path, alone_run: Path, tmp_path: Path) -> None:
    """Format 1 began with these fields alone."""
    config = toy_config(shards)
    run_world(1, train, config, tmp_path, 2)
    checkpoint = step_directory(tmp_path / "checkpoints", 2)
    content = json.loads((checkpoint / "detour.json").read_text())
    first_fields = ["format", "step", "phase", "architecture", "config"]
    first_fields += ["recorder", "guards", "optimizer", "data", "files"]
    (checkpoint / "detour.json").write_text(json.dumps({name: content[name] for name in first_fields}))
    run_world(1, train, config, tmp_path)
    assert trained(tmp_path) == trained(alone_run)


@pytest.mark.parametrize("field", ["step", "architecture", "optimizer", "files", "phase", "data", "recorder", "guards"])
def test_a_record_without_a_field_that_a_resume_reads_is_damaged(field: str, alone_run: Path, tmp_path: Path) -> None:
    shutil.copy(step_directory(alone_run / "checkpoints", 5) / "detour.json", tmp_path)
    rewrite_meta(tmp_path, newer_field=1)
    assert describe(tmp_path).step == 5, "unknown fields are of newer versions"
    rewrite_meta(tmp_path, **{field: None})
    with pytest.raises(InputError, match=field) as error:
        describe(tmp_path)
    assert error.value.code == "checkpoint-damaged"


def test_the_record_is_what_a_resume_reads(alone_run: Path) -> None:
    checkpoint = step_directory(alone_run / "checkpoints", 3)
    meta = describe(checkpoint)
    assert json.loads(json.dumps(meta.to_json())) == json.loads((checkpoint / "detour.json").read_text())
    assert (meta.step, meta.phase, meta.optimizer, sorted(meta.data or {})) == (3, 0, True, ["0", "1", "2", "3"])
