"""The record of what an unfinished preparation has finished, by which it continues."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from configs.errors import InputError
from datapipe.disk import disk_errors_as_input_errors
from datapipe.encode import WrittenShard
from datapipe.inputs import JOURNAL
from datapipe.manifest import NAME, Shard
from datapipe.near_duplicates import NAME as NEAR_DUPLICATES
from datapipe.selection import HELD_OUT, Block


class Journal:
    """The record of the finished shards of an output directory, each known by its documents."""

    def __init__(self, output: Path, identity: str) -> None:
        if (output / NAME).exists():
            raise InputError(
                f"{output} already holds prepared shards; give another directory, or delete it first",
                key="--output",
                code="already-prepared",
            )
        self._path = output / JOURNAL
        self._finished: dict[str, tuple[str, WrittenShard]] = {}
        """Digest of the documents and finished shard, by name."""
        with disk_errors_as_input_errors(output):
            output.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            if not lines:
                _refuse_foreign_tars(output)
                self._path.write_text(identity + "\n", encoding="utf-8")
        if lines and lines[0] != identity:
            raise InputError(
                f"{output} holds an unfinished preparation with other settings; "
                "give another directory, or delete it first",
                key="--output",
                code="other-preparation",
            )
        for line in lines[1:]:
            try:
                name, digest, shard, sources = json.loads(line)
            except ValueError:  # the process was killed while it wrote this line
                continue
            path = output / name
            if path.is_file() and path.stat().st_size == shard["bytes"]:
                self._finished[name] = digest, WrittenShard(Shard(**shard), sources)

    def finished(self, block: Block) -> WrittenShard | None:
        """The shard of exactly these documents, if it was finished before."""
        digest, written = self._finished.get(block.name, ("", None))
        return written if digest == block.digest else None

    def add(self, block: Block, written: WrittenShard) -> None:
        """Note a finished shard."""
        with disk_errors_as_input_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([block.name, block.digest, asdict(written.shard), written.sources]) + "\n")

    def remove_others(self, names: Iterable[str]) -> None:
        """Delete shards that were finished before the text was changed, and are no longer needed."""
        for name in self._finished.keys() - set(names):
            for path in (self._path.parent / name, (self._path.parent / name).with_suffix(".idx")):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the record of a preparation that is complete."""
        self._path.unlink()
        for path in self._path.parent.glob(f"{NEAR_DUPLICATES}*"):
            path.unlink()


def _refuse_foreign_tars(output: Path) -> None:
    """Raise InputError if shards would replace tars of others: WebDataset's first one has the name of ours."""
    foreign = next((path for folder in (output, output / HELD_OUT) for path in sorted(folder.glob("*.tar"))), None)
    if foreign is not None:
        raise InputError(
            f"{foreign} is there already, and Detour did not make it; give another directory for the shards",
            key="--output",
            code="other-tars",
        )
