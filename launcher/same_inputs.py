"""Whether `model.init` and `tokenizer` of a continued run still name what the run started from."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InputError
from configs.schema import SCRATCH, RunConfig
from datapipe.paths import local_path
from datapipe.tokenizer import load_tokenizer
from monitoring.events import InitialModel
from monitoring.log import read_events
from monitoring.run_directory import RunDirectory


def spelt_as_before(directory: Path, before: RunConfig, now: RunConfig) -> RunConfig:
    """Return `now` with the references of `before`, where both name the same content.

    Args:
        directory: The run directory.
        before: The run's configuration.
        now: The configuration of another start of the run.
    """
    if now.model.init != before.model.init and _is_same_model(directory, before.model.init, now.model.init):
        now = now.model_copy(update={"model": now.model.model_copy(update={"init": before.model.init})})
    if now.tokenizer != before.tokenizer and _is_same_tokenizer(directory, before.tokenizer, now.tokenizer):
        now = now.model_copy(update={"tokenizer": before.tokenizer})
    return now


def _is_same_model(directory: Path, before: str, now: str) -> bool:
    if SCRATCH in (before, now):
        return False
    if _is_same_path(before, now):
        return True
    from engine.initial_weights import initial_sha256

    known = [event["sha256"] for event in read_events(directory) if event["event"] == InitialModel.KIND]
    try:
        return (known[-1] if known else initial_sha256(before)) == initial_sha256(now)
    except InputError:  # what cannot be read cannot be shown to be the same
        return False


def _is_same_tokenizer(directory: Path, before: str, now: str) -> bool:
    if _is_same_path(before, now):
        return True
    copy = RunDirectory(directory).tokenizer
    try:
        kept, chosen = load_tokenizer(str(copy) if copy.is_dir() else before), load_tokenizer(now)
    except InputError:
        return False
    framing = [(one.prefix_ids, one.suffix_ids, one.special_ids, one.mask_id) for one in (kept, chosen)]
    return framing[0] == framing[1] and kept.content_sha256 == chosen.content_sha256


def _is_same_path(before: str, now: str) -> bool:
    try:
        return local_path(before).resolve() == local_path(now).resolve()
    except InputError:  # no such `package://` file
        return False
