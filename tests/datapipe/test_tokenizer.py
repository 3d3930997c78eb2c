"""Tokenizers: identity by content, framing, bytes per token, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from configs.errors import InputError
from configs.schema import Data
from datapipe.loader import check_sources
from datapipe.manifest import TokenizerIdentity, read_manifest
from datapipe.prepare import prepare
from datapipe.source import Source
from datapipe.tokenizer import BOM, Tokenizer, load_tokenizer
from datapipe.vocabulary import first_difference, pieces_of_new_tokens
from tests.datapipe.conftest import refused
from tests.toy_tokenizers import byte_level, extended, sentencepiece_like

Make = Callable[[Path], Path]
MAKERS: dict[str, Make] = {"byte level": byte_level, "SentencePiece": sentencepiece_like}
FORMAT_1 = Path(__file__).parent / "format_1"


@pytest.fixture(scope="module", params=MAKERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("tokenizer"))


def _saved_again(folder: Path, again: Path) -> Path:
    """As fine-tuning leaves it: with padding and truncation, other files, and keys in another order."""
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    theirs("a", padding="max_length", max_length=8, truncation=True)
    theirs.save_pretrained(again)
    content = json.loads((again / "tokenizer.json").read_text(encoding="utf-8"))
    (again / "tokenizer.json").write_text(json.dumps(dict(sorted(content.items())), indent=4), encoding="utf-8")
    return again


def test_a_tokenizer_saved_again_is_the_same(made: Path, tmp_path: Path) -> None:
    before, after = load_tokenizer(str(made)), load_tokenizer(str(_saved_again(made, tmp_path / "again")))
    assert before.sha256 != after.sha256
    assert before.content_sha256 == after.content_sha256
    assert first_difference(before, after) is None
    assert (before.prefix_ids, before.suffix_ids) == (after.prefix_ids, after.suffix_ids)
    (tmp_path / "a.txt").write_text("The patient was sent home.")
    prepare([str(tmp_path / "a.txt")], after, tmp_path / "shards")
    data = Data(streams=1, sources=[{"name": "a", "shards": str(tmp_path / "shards")}])
    (summary,) = check_sources(data, before, before.vocab_size)
    assert summary.framed_tokens == summary.tokens + 2


@pytest.mark.parametrize("place", ["model", "normalizer", "pre_tokenizer", "added_tokens", "merges"])
def test_what_changes_ids_changes_the_identity(place: str, tmp_path: Path) -> None:
    before = load_tokenizer(str(byte_level(tmp_path)))
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    if place == "model":
        content["model"]["ignore_merges"] = True
    elif place == "normalizer":
        content["normalizer"] = {"type": "NFKC"}
    elif place == "pre_tokenizer":
        content["pre_tokenizer"]["add_prefix_space"] = True
    elif place == "merges":
        content["model"]["merges"].reverse()
    else:
        content["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(str(tmp_path)).content_sha256 != before.content_sha256


def test_shards_of_0_1_0_take_a_tokenizer_that_was_saved_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    identity = read_manifest(FORMAT_1).tokenizer
    assert not identity.content_sha256
    again = load_tokenizer(str(_saved_again(tokenizer.directory, tmp_path)))
    assert again.sha256 != identity.sha256
    assert identity.is_of(tokenizer) and identity.is_of(again)
    assert not replace(identity, name="elsewhere").is_of(again)
    assert not replace(TokenizerIdentity.of(tokenizer), sha256="0" * 64, content_sha256="1" * 64).is_of(tokenizer)


def test_documents_are_framed_as_a_text_for_fine_tuning(made: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(made))
    text = "The patient was sent home."
    (tmp_path / "a.txt").write_text(text)
    prepare([str(tmp_path / "a.txt")], tokenizer, tmp_path / "shards")
    data = Data(streams=1, sources=[{"name": "a", "shards": str(tmp_path / "shards"), "upsample": 2}])
    source = Source(data.sources[0], data, tokenizer)
    framed = source.with_special_tokens(0, 0)
    assert framed.tolist() == PreTrainedTokenizerFast.from_pretrained(made)(text)["input_ids"]
    assert source.weight == 2 * len(framed)


@pytest.mark.parametrize("template", ["[CLS] $A", "[CLS] [CLS] $A [SEP] [PAD]", "$A [SEP]"])
def test_any_frame_is_counted(template: str, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(byte_level(tmp_path) / "tokenizer.json"))
    special = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]", "[PAD]")]
    backend.post_processor = processors.TemplateProcessing(template, None, special)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.encode(["fever"])[0].tolist()
    assert [*tokenizer.prefix_ids, *ids, *tokenizer.suffix_ids] == backend.encode("fever").ids
    assert tokenizer.framing_length == len(template.split()) - 1
    assert tokenizer.framing == template.replace("$A", "...")


def test_without_a_frame_of_its_own_the_roles_frame(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(byte_level(tmp_path, framed=False)))
    assert not tokenizer.frames_itself
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((tokenizer.cls_id,), (tokenizer.sep_id,))
    assert "by role" in tokenizer.framing


@pytest.mark.parametrize("config", [{}, {"mask_token": None, "added_tokens_decoder": {}}])
def test_saved_files_name_the_tokens(config: dict[str, Any], made: Path, tmp_path: Path) -> None:
    """transformers guesses none, so an export's tokenizer would have no mask token."""
    before = load_tokenizer(str(made))
    roles = ("pad_token", "mask_token", "cls_token", "sep_token")
    copytree(made, tmp_path / "unnamed")
    (tmp_path / "unnamed" / "special_tokens_map.json").write_text(json.dumps(before.role_tokens))
    (tmp_path / "unnamed" / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(str(tmp_path / "unnamed")).save(tmp_path / "saved")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert {role: getattr(theirs, role) for role in roles} == before.role_tokens
    before.save(tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer_config.json").read_bytes() == (made / "tokenizer_config.json").read_bytes()


def test_the_ids_of_mmbert(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_like(tmp_path)))
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 1, 2, 1)
    assert tokenizer.framing == "<bos> ... <eos>"
    assert tokenizer.mask_token == "<mask>"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bytes_per_token_add_up_to_the_text(text: str, tokenizer: Tokenizer, made: Path) -> None:
    for one in (tokenizer, _loaded(made)):
        text = unicodedata.normalize("NFC", text)
        ids = one.encode([text])[0]
        assert b"".join(one.token_bytes[int(token_id)] for token_id in ids).decode() == text
        assert one.byte_lengths[ids].sum() == len(text.encode())
    assert not tokenizer.byte_lengths[list(tokenizer.special_ids)].any()


_LOADED: dict[Path, Tokenizer] = {}


def _loaded(folder: Path) -> Tokenizer:
    if folder not in _LOADED:
        _LOADED[folder] = load_tokenizer(str(folder))
    return _LOADED[folder]


def test_new_tokens_are_made_of_the_pieces_of_their_text(made: Path, tmp_path: Path) -> None:
    trained, chosen = load_tokenizer(str(made)), load_tokenizer(str(extended(tmp_path, made)))
    assert first_difference(trained, chosen) is None
    assert first_difference(chosen, trained) is not None
    pieces = pieces_of_new_tokens(trained, chosen)
    assert list(pieces) == [trained.vocab_size, trained.vocab_size + 1, trained.vocab_size + 2]
    texts = [b"".join(trained.token_bytes[token_id] for token_id in ids).decode() for ids in pieces.values()]
    assert texts == ["pneumothorax", "antibiotiques", "[PATIENT]"]
    assert pieces_of_new_tokens(trained, trained) == {}


def test_a_byte_order_mark_is_read_and_not_passed_on(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "marked")
    before = load_tokenizer(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(BOM + (folder / name).read_bytes())
    after = load_tokenizer(str(folder))
    assert replace(after, name=before.name) == before
    after.save(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        json.loads((tmp_path / "saved" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ('{"mask_token": "[MASK]",}', "tokenizer_config.json"),
        ("[1]", "tokenizer_config.json"),
        ('{"mask_token": "<absent>"}', "<absent>"),
        ('{"mask_token": "[UNK]", "unk_token": "[UNK]"}', "unk"),
        ('{"mask_token": "[PAD]"}', "pad"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_with(config: str, names: str, tmp_path: Path) -> None:
    (byte_level(tmp_path) / "tokenizer_config.json").write_text(config)
    with refused("tokenizer-unusable", names, key="tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("model", [tokenizers.models.WordLevel, tokenizers.models.WordPiece])
def test_a_tokenizer_that_fails_at_unknown_words(model: Any, tmp_path: Path) -> None:
    names = ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "a")
    backend = tokenizers.Tokenizer(model({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with refused("tokenizer-unusable", "unk_token", key="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_model_directory_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with refused("tokenizer-unusable", "tokenizer.json", key="tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("record", [{}, {"config": {"tokenizer": "T"}}, {"source": "T"}, "copy"])
def test_the_tokenizer_of_a_checkpoint(record: object, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    folder = byte_level(tmp_path / "run" / "tokenizer" if record == "copy" else tmp_path / "T")
    content = {} if record == "copy" else json.loads(json.dumps(record).replace('"T"', json.dumps(str(folder))))
    (checkpoint / "detour.json").write_text(json.dumps(content))
    if not record:
        with pytest.raises(InputError) as refusal:
            load_tokenizer(str(checkpoint))
        assert refusal.value.key == "tokenizer"
    else:
        assert load_tokenizer(str(checkpoint)).sha256 == load_tokenizer(str(folder)).sha256


def test_byte_lengths_have_a_row_per_id(made: Path) -> None:
    tokenizer = load_tokenizer(str(made))
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths.dtype == np.int32
