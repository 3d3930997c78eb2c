"""The work of the processes that tokenize: documents of a shard -> the shard."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

from datapipe.disk import writing
from datapipe.manifest import Shard
from datapipe.selection import Block, Selection
from datapipe.shards import ShardWriter
from datapipe.text import Text
from datapipe.tokenizer import Tokenizer, load_tokenizer


class Written(NamedTuple):
    shard: Shard
    sources: dict[str, dict[str, int]]
    """Source -> what became of its documents: kept `documents` and `tokens`, and those left out, by reason."""


class Here(Executor):
    """Works in this process, at once: for input so small that starting others would take longer."""

    def __init__(self, tokenizer: Tokenizer, encoded: Any) -> None:
        global _tokenizer, _encoded
        _tokenizer, _encoded = tokenizer, encoded

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **keywords))
        return future


_tokenizer: Tokenizer
_encoded: Any


def start_process(directory: str, encoded: Any) -> None:
    """Of a process of the pool: the tokenizer to use, and the shared counter of bytes tokenized."""
    global _tokenizer, _encoded
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _tokenizer, _encoded = load_tokenizer(directory), encoded


def _leave_with_parent() -> None:
    """A killed parent cannot stop its workers, and theirs would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write_shard(block: Block, output: Path, selection: Selection) -> Written:
    """Tokenize documents into one shard, which appears only when it is complete."""
    path = output / block.name
    sources: dict[str, Counter[str]] = {}
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        writer = ShardWriter(path)
        try:
            for start in range(0, len(block.texts), 64):
                _write_documents(block.texts[start : start + 64], writer, selection, sources)
            shard = writer.close()
        except BaseException:
            writer.discard()
            raise
    return Written(shard, {name: dict(counts) for name, counts in sources.items()})


def _write_documents(
    texts: list[tuple[str, Text]], writer: ShardWriter, selection: Selection, sources: dict[str, Counter[str]]
) -> None:
    for (source, text), ids in zip(texts, _tokenizer.encode([t.text.decode() for _, t in texts]), strict=True):
        counts = sources.setdefault(source, Counter())
        if len(ids) < max(selection.min_tokens, 1):
            counts["too short" if len(ids) else "empty"] += 1
        elif selection.max_tokens is not None and len(ids) > selection.max_tokens:
            counts["too long"] += 1
        else:
            writer.add(ids, {"source": source, "id": text.id})
            counts.update(documents=1, tokens=len(ids))
    with _encoded.get_lock():
        _encoded.value += sum(len(text.text) for _, text in texts)
