"""Canaries: exactly the stated copies, in training text only, the same at any number of processes."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import datapipe.prepare
from configs.errors import InputError
from configs.load import validate
from configs.schema import Data, Reading, RunConfig
from datapipe.canaries import COPIES, FILE, PLANTED, canaries_of_sources, candidates, draw, parse_canaries
from datapipe.manifest import read_manifest
from datapipe.paths import local_path
from datapipe.prepare import ensure_prepared, prepare
from datapipe.selection import HELD_OUT, Selection
from datapipe.shard_report import inspect_shards
from datapipe.text import read_texts
from datapipe.tokenizer import Tokenizer
from tests.datapipe.conftest import refused
from tests.datapipe.test_prepare import TICO, digests, documents, lines
from tests.toy_recipe import toy_recipe

STRICT = Reading(canaries=10, where="id != 5", strict=True)
EVERY_FILTER = Selection(dedup=True, min_tokens=30, max_tokens=60, held_out=0.2, near_dedup=0.8)
"""Rules that would drop most copies if they met them."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [text.text.decode() for text in read_texts(local_path(TICO))][:1200]
    return lines(
        tmp_path_factory.mktemp("corpus") / "notes.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)]
    )


@pytest.fixture(scope="module", autouse=True)
def _small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datapipe.prepare, "SHARD_TEXT", 40_000)
        patch.setattr(datapipe.prepare, "SMALL", 20_000)
        yield


@pytest.fixture(scope="module")
def prepared(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "shards"
    prepare([str(corpus)], tokenizer, output, selection=EVERY_FILTER, reading=STRICT, processes=1)
    return output


def test_every_canary_has_its_copies_and_nothing_else_changes(
    corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    known = parse_canaries((prepared / FILE).read_bytes(), FILE)
    assert Counter(canary.copies for canary in known.canaries) == {0: 10, 1: 3, 4: 3, 16: 2, 64: 2}
    ids = [tuple(found.tolist()) for found in tokenizer.encode([canary.text for canary in known.canaries])]
    found = Counter(map(tuple, documents(prepared)))
    assert [found[one] for one in ids] == [canary.copies for canary in known.canaries]
    held_out = {tuple(one) for one in documents(prepared / HELD_OUT)}
    assert held_out
    assert not held_out & set(ids)
    plain = Reading(where="id != 5", strict=True)
    prepare([str(corpus)], tokenizer, tmp_path / "plain", selection=EVERY_FILTER, reading=plain, processes=1)
    assert [tuple(one) for one in documents(tmp_path / "plain")] == [
        one for one in map(tuple, documents(prepared)) if one not in set(ids)
    ]
    assert digests(tmp_path / "plain" / HELD_OUT) == digests(prepared / HELD_OUT)
    manifest = read_manifest(prepared)
    assert known.documents == manifest.documents
    assert manifest.sources[PLANTED]["documents"] == sum(canary.copies for canary in known.canaries)
    assert "planted" in str(inspect_shards(prepared))
    assert "planted" not in str(inspect_shards(tmp_path / "plain"))


def test_the_copies_lie_in_every_shard(prepared: Path, tokenizer: Tokenizer) -> None:
    most = max(parse_canaries((prepared / FILE).read_bytes(), FILE).planted, key=lambda canary: canary.copies)
    ids = tokenizer.encode([most.text])[0].tolist()
    places = [number for number, one in enumerate(documents(prepared)) if one == ids]
    manifest = read_manifest(prepared)
    assert len(manifest.shards) > 1
    for quarter in range(4):
        assert 3 < sum(quarter == 4 * place // manifest.documents for place in places) < 35


def test_the_bytes_depend_neither_on_processes_nor_on_interruptions(
    corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "shards"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(datapipe.prepare, "write_canaries", interrupt)
        prepare([str(corpus)], tokenizer, output, selection=EVERY_FILTER, reading=STRICT, processes=2)
    with refused("other-preparation", key="--output"):
        other = STRICT.model_copy(update={"canaries": 11})
        prepare([str(corpus)], tokenizer, output, selection=EVERY_FILTER, reading=other)
    prepare([str(corpus)], tokenizer, output, selection=EVERY_FILTER, reading=STRICT, processes=1)
    assert digests(output) == digests(prepared)
    with refused("already-prepared", key="--output"):
        prepare([str(corpus)], tokenizer, output, selection=EVERY_FILTER, reading=STRICT)


def test_secrets_follow_the_text(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Equal text in another file has equal secrets, and other text or another number has others."""
    short = b"".join(corpus.read_bytes().splitlines(keepends=True)[:50])
    (tmp_path / "a.jsonl").write_bytes(short)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(short))
    (tmp_path / "c.jsonl").write_bytes(short + b'{"id": 51, "text": "one more"}\n')
    seeds = []
    for number, (name, count) in enumerate([("a.jsonl", 4), ("b.jsonl.gz", 4), ("c.jsonl", 4), ("a.jsonl", 5)]):
        output = tmp_path / str(number)
        prepare([str(tmp_path / name)], tokenizer, output, reading=Reading(canaries=count))
        seeds.append(parse_canaries((output / FILE).read_bytes(), FILE).seed)
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


def test_names_are_distinct_and_the_first_ones_stay() -> None:
    many = draw("seed", 2000)
    assert len({one.text.partition(".")[0] for one in many}) == 2000
    assert draw("seed", 100) == many[:100]
    assert candidates("seed", 1900, canaries=50) == many[100:]
    digits = Counter("".join(one.secret for one in many).replace(" ", ""))
    assert all(1400 < digits[digit] < 1800 for digit in "0123456789")


def test_refusals(corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with refused("nothing-to-prepare", key="--canaries"):
        prepare([str(corpus)], tokenizer, tmp_path / "a", selection=Selection(held_out=1.0), reading=STRICT)
    with refused("nothing-to-prepare"):
        prepare([str(corpus)], tokenizer, tmp_path / "b", selection=Selection(min_tokens=10_000), reading=STRICT)
    source = {"name": "notes", "text": str(corpus), "shards": str(prepared)}
    ensure_prepared(Data(sources=({**source, "reading": {"canaries": 10}},)), tokenizer)
    with refused("other-canaries", str(prepared)):
        ensure_prepared(Data(sources=({**source, "reading": {"canaries": 50}},)), tokenizer)
    with pytest.raises(InputError) as refusal:
        evaluation = {"shards": "held-out", "reading": {"canaries": 1}}
        validate(
            RunConfig,
            toy_recipe([{"name": "notes", "shards": "shards"}], {"data": {"evaluation": evaluation}}),
            "recipe",
        )
    assert refusal.value.key == "data.evaluation.reading"


def test_canaries_of_sources(corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "manifest.json").write_bytes((prepared / "manifest.json").read_bytes())
    data = Data(sources=({"name": "notes", "shards": str(prepared)},))
    assert [canary.copies for canary in canaries_of_sources(data)["notes"].planted[:4]] == list(COPIES)
    lost = Data(sources=({"name": "notes", "shards": str(copy)},))
    with refused("canaries-missing", "source notes", key="data.sources"):
        canaries_of_sources(lost)
    for damage in (b"{", b"[]", json.dumps({"format_version": 2}).encode()):
        (copy / FILE).write_bytes(damage)
        with refused("canaries-damaged", str(copy)):
            canaries_of_sources(lost)
    with refused("no-such-directory", "source notes"):
        canaries_of_sources(Data(sources=({"name": "notes", "shards": str(tmp_path / "gone")},)))


def test_patterns_of_identifiers_leave_canaries_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    patterns = tmp_path / "patterns.txt"
    patterns.write_text(r"\d( ?\d)*" + "\n")
    notes = lines(tmp_path / "notes.jsonl", [{"text": f"Seen at {hour} o'clock."} for hour in range(20)])
    reading = Reading(canaries=4, identifiers=str(patterns))
    prepare([str(notes)], tokenizer, tmp_path / "shards", reading=reading, processes=1)
    sources = read_manifest(tmp_path / "shards").sources
    assert [bool(counts.get("marked")) for name, counts in sorted(sources.items())] == [
        name != PLANTED for name in sorted(sources)
    ]
