"""`detour inspect` on directories that it cannot describe."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import InputError
from datapipe.tokenizer import load_tokenizer
from launcher.describe import describe
from tests.datapipe.conftest import write_shards
from tests.datapipe.tars import TAR_END, tar_member
from tests.toy_recipe import TOKENIZER


def test_what_cannot_be_inspected_says_why(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.tar").write_bytes(tar_member("0.txt", b"one") + TAR_END)
    empty = write_shards(tmp_path / "empty", [[]], load_tokenizer(TOKENIZER))
    for target, code, name in (
        (Path("s3://bucket/corpus"), "not-local", "bucket"),
        (raw, "no-manifest", "manifest.json"),
        (empty, None, "empty"),
    ):
        with pytest.raises(InputError) as refusal:
            describe(target)
        assert name in str(refusal.value)
        assert code is None or refusal.value.code == code
