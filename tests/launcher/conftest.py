from __future__ import annotations

from pathlib import Path

import pytest

from datapipe.prepare import prepare
from datapipe.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The English sample corpus, prepared."""
    output = tmp_path_factory.mktemp("shards") / "en"
    prepare(["package://corpus/tico19_en.jsonl.gz"], load_tokenizer("package://tokenizer/modernbert"), output)
    return output
