"""Tokenizing the documents of a shard and writing it, in this process or in one of a pool."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datapipe.canaries import PLANTED
from datapipe.disk import disk_errors_as_input_errors
from datapipe.identifiers import Patterns, find_identifiers, merge_overlapping
from datapipe.manifest import Shard, add_counts
from datapipe.overlap import HeldOutDocuments
from datapipe.records import Text
from datapipe.selection import HELD_OUT, Block, Selection
from datapipe.shard_writer import ShardWriter
from datapipe.tokenizer import Tokenizer, load_tokenizer


class WrittenShard(NamedTuple):
    """A finished shard and what became of the documents that were meant for it."""

    shard: Shard
    sources: dict[str, dict[str, int]]
    """Counts per source, as in a manifest."""


@dataclass(frozen=True)
class ShardEncoder:
    """Turns blocks of text into shards of an output directory."""

    tokenizer: Tokenizer
    output: Path
    selection: Selection
    encoded: Any
    """`multiprocessing.Value`: bytes of text tokenized so far, by all processes."""
    patterns: Patterns = ()
    """Patterns of identifiers to look for in the texts."""
    held_out: HeldOutDocuments | None = None
    """Documents to compare training documents with."""

    def write(self, block: Block) -> WrittenShard:
        """Tokenize a block into one shard, which appears only when it is complete.

        Raises:
            InputError: The disk refuses the shard.
        """
        path = self.output / block.name
        sources: dict[str, dict[str, int]] = {}
        with disk_errors_as_input_errors(path):
            path.parent.mkdir(exist_ok=True)
            writer = ShardWriter(path)
            try:
                held_out = None if block.name.startswith(HELD_OUT) else self.held_out
                for start in range(0, len(block.texts), 64):
                    self._write_documents(block.texts[start : start + 64], writer, sources, held_out)
                shard = writer.close()
            except BaseException:
                writer.discard()
                raise
        return WrittenShard(shard, sources)

    def _write_documents(
        self,
        texts: list[tuple[str, Text]],
        writer: ShardWriter,
        sources: dict[str, dict[str, int]],
        held_out: HeldOutDocuments | None,
    ) -> None:
        selection = self.selection
        contents = [text.text.decode() for _, text in texts]
        identifiers = [
            # A secret that is never predicted would make an audit find nothing.
            ()
            if source == PLANTED
            else merge_overlapping([*text.identifiers, *find_identifiers(self.patterns, content)])
            for (source, text), content in zip(texts, contents, strict=True)
        ]
        encoded = self.tokenizer.encode_marked(contents, identifiers, self._count)
        for (source, text), found, (ids, marked) in zip(texts, identifiers, encoded, strict=True):
            counts = sources.setdefault(source, {})
            bounded = source != PLANTED
            if len(ids) < (max(selection.min_tokens, 1) if bounded else 1):
                add_counts(counts, {"too short" if len(ids) else "empty": 1})
            elif bounded and selection.max_tokens is not None and len(ids) > selection.max_tokens:
                add_counts(counts, {"too long": 1})
            else:
                writer.add(ids, {"source": source, "id": text.id}, marked)
                kept = {"documents": 1, "tokens": len(ids), "bytes": len(text.text), "longest": len(ids)}
                add_counts(counts, kept)
                if held_out is not None and (near := held_out.is_near(text.text)) is not None:
                    add_counts(counts, {"compared": 1, "near held-out": int(near)})
                if marked is not None:
                    add_counts(counts, {"spans": len(found), "marked": int(marked.sum())})

    def _count(self, size: int) -> None:
        with self.encoded.get_lock():
            self.encoded.value += size


_process_encoder: ShardEncoder | None = None
"""Encoder of this process of a pool: set once by `start_process`, because a task cannot carry a tokenizer."""


def start_process(directory: str, *settings: Any) -> None:
    """Initialise a process of the pool.

    Args:
        directory: Folder of the tokenizer.
        settings: Arguments of ShardEncoder after the tokenizer.
    """
    global _process_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # because the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # because the parent decides what an interrupt means
    # webdataset imports torch where it is installed; without it a process starts seconds sooner and is far smaller.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _process_encoder = ShardEncoder(load_tokenizer(directory), *settings)


def write_in_process(block: Block) -> WrittenShard:
    """Write a shard by the encoder of this process of the pool."""
    assert _process_encoder is not None
    return _process_encoder.write(block)


def _exit_with_parent() -> None:
    """End this process when its parent dies: a killed parent stops no workers, and they would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
