"""A stopped run goes on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError
from configs.schema import RunConfig
from engine.checkpoint import describe, latest_valid, prune, step_directory, verify
from monitoring.log import read_events, read_metrics
from tests.engine.world import run_world, stored, toy_config, train

TRAINED = ("step", "phase", "objective", "loss", "tokens", "learning_rate", "grad_norm", "packing_ratio")


def trained(directory: Path) -> list[dict[str, Any]]:
    """What the log says of the training itself, without the clock's part."""
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


def test_bf16_goes_on_bit_identical(shards: Path, tmp_path: Path) -> None:
    """The computing weights are rounded from the fp32 ones that the optimizer keeps; a checkpoint has both."""
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


def test_saved_at_tp2_pp2_goes_on_alone(shards: Path, alone_run: Path, tmp_path: Path) -> None:
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
    # It counts no longer, or the retention would delete what the run saves before it comes to that step again.
    run_world(1, train, toy_config(shards, checkpoint={"every": "1 steps", "keep": 1}), tmp_path, 1)
    assert sorted(path.name for path in older.parent.iterdir()) == [".step-00000004.damaged", "step-00000004"]
    run_world(1, train, config, tmp_path)
    assert trained(tmp_path) == trained(alone_run)
    (event,) = (event for event in read_events(tmp_path) if event["event"] == "checkpoint_damaged")
    assert victim.name in event["reason"]


def test_a_checkpoint_of_another_model_size_is_refused(shards: Path, alone_run: Path) -> None:
    wider = toy_config(shards, model={"hidden_size": 64})
    with pytest.raises(AssertionError, match=r"holds a model of another size \(hidden_size 32 -> 64"):
        run_world(1, train, wider, alone_run)


def with_index(alone_run: Path, folder: Path, content: bytes) -> Path:
    """A copy of the finished run's checkpoint with another index, its size and sha256 put right."""
    checkpoint = folder / "checkpoints" / "step-00000005"
    shutil.copytree(step_directory(alone_run / "checkpoints", 5), checkpoint)
    (checkpoint / ".metadata").write_bytes(content)
    meta = describe(checkpoint)
    meta["files"][".metadata"] = (len(content), hashlib.sha256(content).hexdigest())
    (checkpoint / "detour.json").write_text(json.dumps(meta))
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
    """Protocol 4 walks dotted names, so `filesystem`'s own import of os would lend os.mkdir."""

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
    """As Python 3.11.0 to 3.11.3 does, which is Debian 12's: by `builtins.getattr`, which is not trusted."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    from engine.megatron.torch_index import _pickled

    index = pickle.loads((step_directory(alone_run / "checkpoints", 5) / ".metadata").read_bytes())
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    assert b"getattr" in pickle.dumps(index)
    assert b"getattr" not in _pickled(index)


def test_an_index_that_calls_a_weight_a_pickle_is_not_loaded(alone_run: Path, tmp_path: Path) -> None:
    """Torch's planner would unpickle it without restriction."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = pickle.loads((step_directory(alone_run / "checkpoints", 5) / ".metadata").read_bytes())
    index.state_dict_metadata["decoder.final_layernorm.weight"] = BytesStorageMetadata()
    checkpoint = with_index(alone_run, tmp_path, pickle.dumps(index))
    with pytest.raises(InputError, match=r"decoder\.final_layernorm\.weight is no tensor: it is not trusted"):
        verify(checkpoint)


def train_with_a_fast_clock(config: RunConfig, directory: Path) -> Any:
    """Train; the clock is 25 seconds ahead for every time it was looked at."""
    import time
    from types import SimpleNamespace

    from engine import trainer

    looks = iter(range(1, 10**9))
    clock = {"monotonic": lambda: time.monotonic() + 25 * next(looks), "perf_counter": time.perf_counter}
    trainer.time = SimpleNamespace(**clock)  # type: ignore[attr-defined]
    return train(config, directory)


def test_checkpoints_by_the_minute(shards: Path, tmp_path: Path) -> None:
    """The rank that decides looks once a step, and once as a save begins."""
    config = toy_config(shards, phases=[{"objective": "clm", "steps": 8}], checkpoint={"every": "1 minutes"})
    run_world(2, train_with_a_fast_clock, config, tmp_path)
    saved = [event["step"] for event in read_events(tmp_path) if event["event"] == "checkpoint_saved"]
    assert saved == [3, 6, 8]


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        step_directory(tmp_path, step).mkdir()
    (tmp_path / ".step-00000005.partial").mkdir()
    prune(tmp_path, keep=1, keep_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} is not a Detour checkpoint"):
        describe(tmp_path)
