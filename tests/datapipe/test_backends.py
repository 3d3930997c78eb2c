"""DALI, raw text, evaluation, and the thread that works ahead."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.schema import Data
from datapipe.batch import IGNORE, PackedSequence, StepData
from datapipe.dali import DaliBatches
from datapipe.loader import Loader, check_sources, evaluation_batches
from datapipe.paths import local_path
from datapipe.prepare import ensure_prepared
from datapipe.tar_members import DamagedError
from datapipe.targets import Masked, Mixed, NextToken, NumpyBatches, Targets
from datapipe.text import read_texts
from datapipe.tokenizer import Tokenizer
from datapipe.words import word_starts
from tests.datapipe.conftest import refused
from tests.datapipe.tars import TAR_END, tar_member

CORPUS = "package://corpus/tico19_fr.jsonl.gz"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Data:
    folder = tmp_path_factory.mktemp("shards")
    data = Data(
        sequence_length=128,
        streams=4,
        sources=[{"name": "tico", "text": CORPUS, "shards": str(folder / "tico")}],
        evaluation={"shards": str(folder / "tico"), "sequences": 21},
    )
    ensure_prepared(data, tokenizer)
    return data


def masked(tokenizer: Tokenizer) -> Masked:
    return Masked(0.3, (0.6, 0.3, 0.1), 7, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)


def assert_same(ours: list[StepData], theirs: list[StepData]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            for field in ("inputs", "labels", "cu_seqlens"):
                left, right = getattr(a, field), getattr(b, field)
                assert left.dtype == right.dtype
                np.testing.assert_array_equal(left, right)
            assert (a.tokens, a.objective) == (b.tokens, b.objective)


def made(tokenizer: Tokenizer) -> dict[str, Targets | Mixed]:
    by_word = replace(masked(tokenizer), starts_word=word_starts(tokenizer))
    changing = replace(masked(tokenizer), final_rate=0.05, steps=(10, 40))
    mixed = Mixed((NextToken(), by_word), (0.4, 0.6), 7)
    return {"clm": NextToken(), "mlm": masked(tokenizer), "words": by_word, "rates": changing, "mixture": mixed}


@pytest.mark.parametrize("objective", ["clm", "mlm", "words", "rates", "mixture"])
def test_dali_makes_the_same_batches(data: Data, tokenizer: Tokenizer, objective: str) -> None:
    targets = made(tokenizer)[objective]
    dali = data.model_copy(update={"backend": "dali"})
    ours = list(Loader(data, 8, tokenizer, 0, 2).steps(targets, 2, 0, 40, None))
    theirs = list(Loader(dali, 8, tokenizer, 0, 2).steps(targets, 2, 0, 40, None))
    assert_same(ours, theirs)
    # A run may change the backend at a restart.
    assert_same(ours[25:], list(Loader(dali, 8, tokenizer, 0, 2).steps(targets, 2, 25, 40, ours[24].state)))


def test_dali_looks_up_more_ids_than_one_table_holds(tokenizer: Tokenizer) -> None:
    """Special tokens in every table; its time does not depend on their number."""
    size = 150_000
    ids = np.random.default_rng(1).integers(0, size, 1024).astype(np.int32)
    targets = Masked(0.9, (0.1, 0.8, 0.1), 7, 70_001, size, tuple(sorted({70_001, *ids[::5].tolist(), *range(300)})))
    (ours,) = NumpyBatches(targets)([[PackedSequence(ids, (1024,), 0, 0)]])
    (theirs,) = DaliBatches(targets, 1, 1024, 0, None)([[PackedSequence(ids, (1024,), 0, 0)]])
    np.testing.assert_array_equal(ours.inputs, theirs.inputs)
    np.testing.assert_array_equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_row_has_one_objective_whatever_the_ranks(data: Data, tokenizer: Tokenizer, micro: int) -> None:
    """Micro-batches have one objective each, and at most the asked rows; every row of the step is in one of them."""
    mixed = made(tokenizer)["mixture"]
    drawn: list[dict[tuple[int, int], tuple[str, bytes]]] = []
    for size in (1, 2):
        rows: dict[tuple[int, int], tuple[str, bytes]] = {}
        for rank in range(size):
            for step in Loader(data, 8, tokenizer, rank, size).steps(mixed, micro, 0, 10, None):
                assert sum(len(batch.origins) for batch in step.micro_batches) == 8 // size
                for batch in step.micro_batches:
                    assert 0 < len(batch.origins) <= micro
                    for origin, ids in zip(batch.origins, batch.inputs.reshape(-1, 128), strict=True):
                        rows[origin.stream, origin.number] = batch.objective, ids.tobytes()
        drawn.append(rows)
    assert drawn[0] == drawn[1] and len(drawn[0]) == 80
    assert {objective for objective, _ in drawn[0].values()} == {"clm", "mlm"}


def test_dali_that_is_not_installed(data: Data, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datapipe.dali.Pipeline", None)
    dali = data.model_copy(update={"backend": "dali"})
    with refused("not-installed", key="data.backend"):
        check_sources(dali, tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("member", ["txt", "json"])
def test_raw_text_gives_the_batches_of_prepared_shards(
    data: Data, tokenizer: Tokenizer, tmp_path: Path, member: str
) -> None:
    """Tars of text in the prepared shards' division, streamed with the same exactness."""
    texts = list(read_texts(local_path(CORPUS)))
    contents = [
        t.text if member == "txt" else json.dumps({"text": t.text.decode(), "id": t.id}).encode() for t in texts
    ]
    members = [tar_member(f"{number:06d}.{member}", content) for number, content in enumerate(contents)]
    (tmp_path / "000000.tar").write_bytes(b"".join(members) + TAR_END)
    source = data.sources[0].model_copy(update={"shards": str(tmp_path)})
    raw = data.model_copy(update={"sources": (source,)})
    (summary, _) = check_sources(raw, tokenizer, tokenizer.vocab_size)
    assert (summary.documents, summary.tokens) == (len(texts), 0)
    ours = list(Loader(raw, 8, tokenizer, 0, 1).steps(NextToken(), 2, 0, 60, None))
    assert_same(ours, list(Loader(data, 8, tokenizer, 0, 1).steps(NextToken(), 2, 0, 60, None)))
    assert_same(ours[31:], list(Loader(raw, 8, tokenizer, 0, 1).steps(NextToken(), 2, 31, 60, ours[30].state)))


def test_raw_text_that_is_none(data: Data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    members = [
        tar_member("0.json", b'{"text": "one"}'),
        tar_member("1.json", b'{"title": "two"}'),
        tar_member("2.txt", b"\xff"),
    ]
    (tmp_path / "0.tar").write_bytes(b"".join(members) + TAR_END)
    source = data.sources[0].model_copy(update={"shards": str(tmp_path)})
    raw = data.model_copy(update={"sources": (source,), "streams": 1})
    with pytest.raises(DamagedError) as error:
        list(Loader(raw, 1, tokenizer, 0, 1).steps(NextToken(), 1, 0, 1, None))
    assert error.value.code == "not-text"
    skipping = raw.model_copy(update={"on_error": "skip"})
    (step,) = Loader(skipping, 1, tokenizer, 0, 1).steps(NextToken(), 1, 0, 1, None)
    assert step.drawn["tico"].skipped > 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_evaluation_set_is_the_same_at_every_size(data: Data, tokenizer: Tokenizer, size: int) -> None:
    def labelled_rows(size: int, micro: int) -> list[list[int]]:
        ranks = [evaluation_batches(data, masked(tokenizer), micro, tokenizer, rank, size) for rank in range(size)]
        assert len({len(batches) for batches in ranks}) == 1
        assert all(len(batch.inputs) == micro * 128 for batches in ranks for batch in batches)
        rows = np.concatenate([np.stack([b.inputs, b.labels], 1).reshape(-1, 128, 2) for bs in ranks for b in bs])
        return sorted(row.tolist() for row in rows if (row[:, 1] != IGNORE).any())

    alone = labelled_rows(1, 1)
    assert len(alone) == 21
    assert labelled_rows(size, 4) == alone


def test_an_evaluation_set_that_cannot_be_read(data: Data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_member("0.txt", b"\xff") + TAR_END)
    assert data.evaluation is not None
    evaluation = data.evaluation.model_copy(update={"shards": str(tmp_path)})
    skipping = data.model_copy(update={"evaluation": evaluation, "on_error": "skip"})
    with refused("no-usable-document", key="data.evaluation"):
        evaluation_batches(skipping, NextToken(), 4, tokenizer, 0, 1)


def test_a_small_evaluation_set_is_read_once(data: Data, tokenizer: Tokenizer) -> None:
    assert data.evaluation is not None
    many = data.model_copy(update={"evaluation": data.evaluation.model_copy(update={"sequences": 100_000})})
    batches = evaluation_batches(many, NextToken(), 4, tokenizer, 0, 1)
    (summary, _) = check_sources(many, tokenizer, tokenizer.vocab_size)
    assert sum(batch.tokens for batch in batches) == summary.tokens + 2 * summary.documents


def test_closing_ends_the_thread(data: Data, tokenizer: Tokenizer) -> None:
    steps = Loader(data, 8, tokenizer, 0, 1).steps(NextToken(), 2, 0, 10**9, None)
    next(steps)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "detour-data"]
    steps.close()
    assert not thread.is_alive()


def test_a_process_ends_with_steps_still_open(data: Data, tokenizer: Tokenizer) -> None:
    program = (
        "import sys; from configs.schema import Data; from datapipe.loader import Loader;"
        "from datapipe.targets import NextToken; from datapipe.tokenizer import load_tokenizer;"
        "data, tokenizer = Data.model_validate_json(sys.argv[1]), load_tokenizer('package://tokenizer/modernbert');"
        "steps = Loader(data, 8, tokenizer, 0, 1).steps(NextToken(), 2, 0, 10**9, None); print(next(steps).step)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, data.model_dump_json()], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
