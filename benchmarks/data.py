"""Measure the data path against plain webdataset, plain tokenizers, reading from the start, and the time of a step.

Both sides of a line read the same shards or texts, by turns. The fastest turn counts, because other programs of the
machine slow the others down. Lines of one process are in processor time, which a busy machine distorts less.

    python -m benchmarks.data [--quick | --million] [--json FILE]
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet

from benchmarks.table import Row, arguments, report
from configs.schema import Data, Reading, Source
from datapipe.inputs import find_files
from datapipe.loader import Loader
from datapipe.manifest import Manifest, TokenizerIdentity, read_manifest, write_manifest
from datapipe.near_duplicates import signatures, similar_to_earlier
from datapipe.packing import packing_ratio
from datapipe.paths import local_path
from datapipe.prepare import prepare
from datapipe.shard_writer import ShardWriter
from datapipe.shards import ShardReader
from datapipe.targets import Masked
from datapipe.text import read_texts
from datapipe.tokenizer import Tokenizer, load_tokenizer

CORPORA = ("medquad", "tico19_en", "tico19_fr")
H100 = 300_000
"""Tokens per second that one H100 trains on (ModernBERT base)."""


def main() -> None:
    options = arguments(__doc__, million="only short documents and near-duplicates, 1 million of each")
    if options.million:
        with tempfile.TemporaryDirectory() as name:
            rows = [*near_duplicates(Path(name), 1_000_000), *short_documents(Path(name), 1_000_000)]
        report(rows, options.json)
        return
    rounds = 3 if options.quick else 7
    tokenizer = load_tokenizer("package://tokenizer/modernbert")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for corpus in CORPORA:
            prepare([f"package://corpus/{corpus}.jsonl.gz"], tokenizer, folder / corpus)
        rows = [
            *packing(folder),
            *reading(folder / "medquad", tokenizer, rounds),
            *preparing(folder, tokenizer, copies=2 if options.quick else 8, rounds=1 if options.quick else 3),
            *formats(folder, tokenizer, copies=2 if options.quick else 4),
            *short_documents(folder, count=50_000 if options.quick else 300_000),
            *near_duplicates(folder, count=10_000 if options.quick else 100_000),
            memory(folder, megabytes=20 if options.quick else 100),
            restoring(folder / "large", tokenizer),
            waiting(folder / "demo", steps=40 if options.quick else 140),
        ]
    report(rows, options.json)


def packing(folder: Path) -> list[Row]:
    """Share of tokens that are not padding, with best-fit packing and with documents in their order."""
    rows = []
    for corpus in CORPORA:
        lengths = [len(ids) + 2 for ids in documents(folder / corpus)]
        for length in (1024, 8192):
            name = f"packing ratio, {corpus}, {length}"
            ours = packing_ratio(lengths, length)
            rows.append(Row.at_least(name, ours, 1.0, 0.98 if length == 8192 else None, "of a row"))
            rows.append(Row.at_least(f"{name}, vs as they come", ours, sequential(lengths, length), None, "of a row"))
    return rows


def sequential(lengths: list[int], row: int) -> float:
    """The same share with documents in their order; a document that no longer fits starts the next row."""
    rows, used = 1, 0
    for length in lengths:
        for part in (min(row, length - start) for start in range(0, length, row)):
            rows, used = (rows + 1, part) if used + part > row else (rows, used + part)
    return sum(lengths) / rows / row


def documents(directory: Path) -> list[np.ndarray]:
    result = []
    for shard in read_manifest(directory).shards:
        reader = ShardReader((directory / shard.name).open("rb", buffering=0), shard.name)
        result += [reader.ids(number) for number in range(len(reader))]
    return result


def reading(directory: Path, tokenizer: Tokenizer, rounds: int) -> list[Row]:
    """Read, pack and mask in one process, against webdataset, which only reads and decodes."""
    total = read_manifest(directory).tokens
    urls = [str(directory / shard.name) for shard in read_manifest(directory).shards]
    masked = Masked(0.3, (0.8, 0.1, 0.1), 0, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)

    import webdataset  # not above, because it imports torch, and the processes of `prepare` import this module

    def plain() -> int:
        samples = webdataset.WebDataset(urls, shardshuffle=False).decode()
        return sum(len(sample["ids.npy"]) for sample in samples)

    def ours(length: int) -> Callable[[], int]:
        data = configured(directory, length, streams=8)
        steps = total // (8 * length)

        def run() -> int:
            batches = Loader(data, 8, tokenizer, 0, 1).steps(masked, 1, 0, steps, None)
            return sum(micro.tokens for batch in batches for micro in batch.micro_batches)

        return run

    speeds = race({"webdataset": plain, "1024": ours(1024), "8192": ours(8192)}, rounds)
    unit = "tokens/CPU s"
    return [
        Row.at_least("read, pack, mask at 1024 vs webdataset", speeds["1024"], speeds["webdataset"], 0.8, unit),
        Row.at_least("read, pack, mask at 8192 vs webdataset", speeds["8192"], speeds["webdataset"], 0.8, unit),
        Row.at_least("read, pack, mask at 8192 on a core vs an H100", speeds["8192"], H100, 10, unit),
    ]


def race(runners: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens per second of processor time per runner, by turns; on an idle core the same as per second."""
    speeds = dict.fromkeys(runners, 0.0)
    for _ in range(rounds):
        for name, run in runners.items():
            started = time.process_time()
            tokens = run()
            speeds[name] = max(speeds[name], tokens / (time.process_time() - started))
    return speeds


def preparing(folder: Path, tokenizer: Tokenizer, copies: int, rounds: int) -> list[Row]:
    """`detour prepare` from file to shards, with the start of its processes, against encode_batch in memory."""
    texts = [text.text.decode() for text in read_texts(local_path("package://corpus/medquad.jsonl.gz"))]
    many = [f"{copy} {text}" for copy in range(copies) for text in texts]
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in many))
    size = path.stat().st_size / 1e6

    def bare() -> None:
        for start in range(0, len(many), 1000):  # in parts, because all at once would need gigabytes
            tokenizer.backend.encode_batch(many[start : start + 1000], add_special_tokens=False)

    def ours() -> None:
        prepare([str(path)], tokenizer, folder / "many")
        shutil.rmtree(folder / "many")

    fastest = {bare: (np.inf, np.inf), ours: (np.inf, np.inf)}
    for _ in range(rounds):
        for run in fastest:
            started, used = time.perf_counter(), sum(os.times()[:4])
            run()
            seconds = time.perf_counter() - started, sum(os.times()[:4]) - used
            fastest[run] = min(fastest[run][0], seconds[0]), min(fastest[run][1], seconds[1])
    (wall, work), (bare_wall, bare_work) = fastest[ours], fastest[bare]
    return [
        Row.at_least("prepare vs encode_batch", size / wall, size / bare_wall, 0.8, "MB text/s"),
        Row.at_least("prepare vs encode_batch, work", size / work, size / bare_work, None, "MB/CPU s"),
    ]


def formats(folder: Path, tokenizer: Tokenizer, copies: int) -> list[Row]:
    """`detour prepare` of csv, parquet and compressed jsonl in one process, against encode_batch in memory."""
    texts = [text.text.decode() for text in read_texts(local_path("package://corpus/medquad.jsonl.gz"))]
    many = [f"{copy} {text}" for copy in range(copies) for text in texts]
    size = sum(len(text.encode()) for text in many) / 1e6
    with (folder / "many.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in many)])
    pyarrow.parquet.write_table(pyarrow.table({"text": many}), folder / "many.parquet")
    with gzip.open(folder / "many.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in many)

    def bare() -> int:
        for start in range(0, len(many), 64):
            tokenizer.backend.encode_batch(many[start : start + 64], add_special_tokens=False)
        return int(size * 1e6)

    def ours(name: str) -> Callable[[], int]:
        def run() -> int:
            prepare([str(folder / name)], tokenizer, folder / "of-format", processes=1)
            shutil.rmtree(folder / "of-format")
            return int(size * 1e6)

        return run

    names = ("many.csv", "many.parquet", "many.jsonl.gz")
    speeds = race({"bare": bare, **{name: ours(name) for name in names}}, rounds=2)
    return [
        Row.at_least(f"prepare {name} vs encode_batch", speeds[name] / 1e6, speeds["bare"] / 1e6, 0.8, "MB/CPU s")
        for name in names
    ]


def short_documents(folder: Path, count: int) -> list[Row]:
    """Size, memory and reading of documents of one line of 94 bytes."""
    rng = np.random.default_rng(0)
    words = [word for word in Path(__file__).read_text().split() if word.isalpha()]
    path, output = folder / "lines.txt", folder / "lines"
    with path.open("w") as file:
        for _ in range(count):
            file.write(" ".join(words[number] for number in rng.integers(0, len(words), 20))[:93] + "\n")
    peak = peak_memory(["prepare", str(path), "--lines", "--output", str(output)])
    manifest = read_manifest(output)
    size = sum(shard.bytes for shard in manifest.shards)
    urls = [str(output / shard.name) for shard in manifest.shards]

    import webdataset  # not above, because it imports torch, and the processes of `prepare` import this module

    few = read_manifest(output).shards[0]
    one = folder / "one-per-sample.tar"
    reader = ShardReader((output / few.name).open("rb", buffering=0), few.name)
    few_documents = min(len(reader), 20_000)
    with webdataset.TarWriter(str(one)) as writer:
        for number in range(few_documents):
            writer.write({"__key__": f"{number:06d}", "ids.npy": reader.ids(number)})

    def plain() -> int:
        return sum(1 for _ in webdataset.WebDataset(str(one), shardshuffle=False).decode())

    def split() -> int:
        documents = 0
        for sample in webdataset.WebDataset(urls[0], shardshuffle=False).decode():
            documents += len(np.split(sample["ids.npy"], np.cumsum(sample["lengths.npy"])[:-1]))
        return documents

    def ours() -> int:
        opened = ShardReader((output / few.name).open("rb", buffering=0), few.name)
        return sum(1 for number in range(len(opened)) if opened.ids(number) is not None)

    speeds = race({"plain": plain, "split": split, "ours": ours}, rounds=3)
    label, unit = f"{count:,} lines of 94 bytes", "documents/CPU s"
    return [
        Row.at_most(f"{label}: shards vs their ids", size, 2 * manifest.tokens, 1.3, "bytes"),
        Row.at_most(f"{label}: peak memory of prepare", peak / 1e9, 0.5, 1, "GB"),
        Row.at_least(f"{label}: read vs webdataset, format 1", speeds["ours"], speeds["plain"], 1, unit),
        Row.at_least(f"{label}: read vs webdataset, format 2, split", speeds["ours"], speeds["split"], None, unit),
    ]


def near_duplicates(folder: Path, count: int) -> list[Row]:
    """Notes of 30 to 2,000 words, a tenth of them copies with a tenth of the words replaced: found, time, memory."""
    path, copies = folder / "notes.jsonl", count // 10
    write_notes(path, count, copies)
    files, cores = find_files(str(path)), len(os.sched_getaffinity(0))
    with PeakMemory(psutil.Process()) as peak:
        started, used = time.perf_counter(), sum(os.times()[:4])
        signed = signatures(files, Reading(), cores)
        signing, compared = sum(os.times()[:4]) - used, sum(os.times()[:4])
        found = similar_to_earlier(signed, 0.8)
        comparing, wall = sum(os.times()[:4]) - compared, time.perf_counter() - started
    label, per_million = f"near-duplicates, {count:,} notes, {path.stat().st_size / 1e6:,.0f} MB", 1e6 / count
    minutes = (signing / 2 + comparing) / 60 * per_million  # signatures keep two cores busy, comparisons one
    path.unlink()
    return [
        Row.at_least(f"{label}: copies found", float(found[-copies:].mean()), 1.0, 0.95, "of the copies"),
        Row.at_most(f"{label}: others taken for one", float(found[:-copies].mean()), 0.01, 1, "of the notes"),
        Row.at_most(f"{label}: two free cores, for 1 M", minutes, 15, 1, "minutes"),
        Row.at_most(f"{label}: wall time here, for 1 M", wall / 60 * per_million, 15, None, "minutes"),
        Row.at_least(f"{label}: CPU time, signatures vs comparison", signing, comparing, None, "CPU s"),
        Row.at_most(f"{label}: peak memory of all processes", peak.bytes / 1e9, 4, 1, "GB"),
    ]


def write_notes(path: Path, count: int, copies: int) -> None:
    """Write notes of 150 words at the median; the last are copies of the first, a tenth of their words replaced."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{number:x}" for number in range(20_000)])
    lengths = np.clip(rng.lognormal(np.log(150), 0.8, count), 30, 2000).astype(int)
    with path.open("w") as file, path.open() as written:
        for number in range(count):
            if number < count - copies:
                note = words[rng.zipf(1.2, lengths[number]) % len(words)]
            else:
                file.flush()
                note = np.array(json.loads(written.readline())["text"].split())
                replaced = rng.choice(len(note), len(note) // 10, replace=False)
                note[replaced] = words[rng.integers(0, len(words), len(replaced))]
            file.write(json.dumps({"id": number, "text": " ".join(note)}) + "\n")


def memory(folder: Path, megabytes: int) -> Row:
    """Peak memory of `detour prepare` and its processes for text of this size and a document of 100 MB."""
    texts = [text.text.decode() for text in read_texts(local_path("package://corpus/medquad.jsonl.gz"))]
    path, size, copy = folder / "huge.jsonl", 0, 0
    with path.open("w") as file:
        while size < megabytes * 1e6:
            copy += 1
            size += sum(file.write(json.dumps({"text": f"{copy} {text}"}) + "\n") for text in texts)
        joined = " ".join(texts)
        file.write(json.dumps({"text": joined * (int(100e6) // len(joined) + 1)}) + "\n")
    peak = peak_memory(["prepare", str(path), "--output", str(folder / "huge")])
    path.unlink()
    return Row.at_most("prepare: peak memory, a document of 100 MB among others", peak / 1e9, 1.5, 1, "GB")


def peak_memory(arguments: list[str]) -> int:
    """Most bytes that a command and its processes use."""
    detour = str(Path(sys.executable).with_name("detour"))
    command = [detour, *arguments, "--tokenizer", "package://tokenizer/modernbert"]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    with PeakMemory(process) as peak:
        process.wait()
    assert process.returncode == 0
    return peak.bytes


class PeakMemory:
    """The most bytes that a process and its children use, their shared pages counted once."""

    def __init__(self, process: psutil.Process) -> None:
        self.bytes = 0
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.2):
            with contextlib.suppress(psutil.NoSuchProcess):  # a process ended meanwhile
                family = [self._process, *self._process.children(recursive=True)]
                self.bytes = max(self.bytes, sum(member.memory_full_info().pss for member in family))


def restoring(directory: Path, tokenizer: Tokenizer) -> Row:
    """Time to the first batch after a restart in the middle of 1 GB of shards, against reading from the start."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50_000, 2**20).astype(np.uint16)
    shards = []
    for number in range(10):
        writer = ShardWriter(directory / f"{number:06d}.tar")
        written = 0
        while written < 100e6:
            start, length = int(rng.integers(0, 2**19)), int(rng.exponential(800)) + 1
            writer.add(ids[start : start + length], {"source": "synthetic"})
            written += 2048 + 2 * length
        shards.append(writer.close())
    manifest = Manifest(TokenizerIdentity.of(tokenizer), tuple(shards))
    write_manifest(directory, manifest)
    loader = Loader(configured(directory, 8192, streams=8), 8, tokenizer, 0, 1)
    masked = Masked(0.15, (0.8, 0.1, 0.1), 0, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)
    middle = manifest.tokens // 2 // (8 * 8192)
    started = time.perf_counter()
    before, reached = deque(loader.steps(masked, 1, 0, middle + 1, None), maxlen=2)
    from_the_start = time.perf_counter() - started
    started = time.perf_counter()
    first = next(loader.steps(masked, 1, middle, middle + 1, before.state))
    restored = time.perf_counter() - started
    for one, other in zip(first.micro_batches, reached.micro_batches, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
    return Row.at_least("restore in 1 GB vs reading to there", 1 / restored, 1 / from_the_start, 20, "a second")


def waiting(output: Path, steps: int) -> Row:
    """Share of the demo's step time in which the training loop waits for data."""
    subprocess.run(
        [
            str(Path(sys.executable).with_name("detour-train")),
            "demo",
            "--output",
            str(output),
            f"phases.0.steps={steps}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=output.parent,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    waited, stepped = (sum(line[key] for line in lines) for key in ("data_wait_seconds", "step_seconds"))
    return Row.at_most("time the demo waits for data vs its steps", waited, stepped, 0.01, "s")


def configured(directory: Path, length: int, streams: int) -> Data:
    return Data(sequence_length=length, streams=streams, sources=(Source(name="corpus", shards=str(directory)),))


if __name__ == "__main__":
    main()
