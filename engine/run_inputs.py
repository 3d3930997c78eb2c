"""Tokenizer, architecture and canaries of a run: by its directory once they are there, else by its recipe.

A run that has begun therefore continues without the directory or hub repository that it started from.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import InputError
from configs.files import partial_path, write_json
from configs.schema import RunConfig
from datapipe.canaries import FORMAT_VERSION, Canaries, canaries_of_sources, parse_canaries
from datapipe.tokenizer import Tokenizer, load_tokenizer
from monitoring.run_directory import RunDirectory

if TYPE_CHECKING:
    from transformers import ModernBertConfig


def run_tokenizer(config: RunConfig, directory: Path) -> Tokenizer:
    """Load the copy that the run keeps, or the recipe's tokenizer where it has none yet.

    Raises:
        InputError: The tokenizer cannot be read.
    """
    copy = RunDirectory(directory).tokenizer
    if copy.is_dir():
        return replace(load_tokenizer(str(copy)), name=config.tokenizer)
    return load_tokenizer(config.tokenizer)


def keep_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Copy the tokenizer into the run directory, unless it is there."""
    copy = RunDirectory(directory).tokenizer
    if copy.is_dir():
        return
    partial = partial_path(copy)
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.rename(copy)


def keep_canaries(config: RunConfig, directory: Path) -> dict[str, Canaries]:
    """Copy the lists of the sources' canaries into the run directory, and return them by source.

    Raises:
        InputError: A source with canaries has lost its list.
    """
    found = canaries_of_sources(config.data)
    if found:
        sources = {name: {"format_version": FORMAT_VERSION, **asdict(canaries)} for name, canaries in found.items()}
        write_json(RunDirectory(directory).canaries, {"sources": sources})
    return found


def run_canaries(config: RunConfig, directory: Path) -> dict[str, Canaries]:
    """Return the run's canaries by source, from its own copy of their lists or else from the sources.

    Raises:
        InputError: The run has no canaries, or their list cannot be read.
    """
    copy = RunDirectory(directory).canaries
    if not copy.is_file():
        found = keep_canaries(config, directory)
    else:
        try:
            sources = json.loads(copy.read_bytes())["sources"].items()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{copy} is damaged; delete it, and it is made again from the sources", code="canaries-damaged"
            ) from None
        found = {name: parse_canaries(json.dumps(content), str(copy)) for name, content in sources}
    if not found:
        raise InputError(
            f"{directory}: no source of this run has canaries, so nothing shows what it memorised; prepare the text "
            "with `detour prepare --canaries 50`, and train on that",
            key="data.sources",
            code="no-canaries",
        )
    return found


def run_architecture(config: RunConfig, directory: Path, tokenizer: Tokenizer) -> ModernBertConfig:
    """Return the architecture of the run's newest checkpoint, or resolve it by the recipe.

    The checkpoint decides only where the recipe's model section asks for what it was saved under.

    Raises:
        InputError: `resolve_architecture` raises it.
    """
    from transformers import ModernBertConfig

    from engine.checkpoint import describe, list_checkpoints
    from engine.modernbert.config import resolve_architecture

    asked = config.model.model_dump(mode="json", exclude={"init"}, exclude_none=True)
    for checkpoint in list_checkpoints(RunDirectory(directory).checkpoints):
        with suppress(InputError):
            meta = describe(checkpoint)
            saved = {key: value for key, value in (meta.config or {}).get("model", {}).items() if key != "init"}
            if saved == asked:
                return ModernBertConfig(**(meta.initial_architecture or meta.architecture))
    return resolve_architecture(config.model, tokenizer)
