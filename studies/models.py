"""Models that a study reads: a run, a checkpoint, or a Hugging Face model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from configs.errors import InputError
from configs.files import file_sha256
from configs.hub import download_snapshot, is_hub_id
from configs.load import load_config
from configs.schema import RunConfig
from datapipe.tokenizer import FILES as TOKENIZER_FILES
from datapipe.tokenizer import load_tokenizer
from monitoring.run_directory import RunDirectory


@contextmanager
def huggingface_directory(model: str) -> Iterator[Path]:
    """Yield the Hugging Face directory of a model. The export of a checkpoint is deleted at the end.

    Args:
        model: Run directory (its final export, else its newest checkpoint), checkpoint, Hugging Face directory or
            hub id.

    Raises:
        InputError: The reference names no model.
    """
    from engine.modernbert.config import CONFIG_FILE

    path = Path(model)
    if path.is_dir():
        path = _export_or_checkpoint(path)
        if (path / CONFIG_FILE).is_file():
            with TemporaryDirectory(prefix="detour-") as folder:
                yield _export(path, Path(folder))
            return
    elif is_hub_id(model):
        path = download_snapshot(model, ["*.json", "*.safetensors", "*.txt"], "MODEL")
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise InputError(
            f"{model} is no model; give a run directory, a checkpoint, a Hugging Face directory with config.json and "
            "safetensors weights, or a hub id such as answerdotai/ModernBERT-base",
            code="not-a-model",
        )
    yield path


def weights_digest(folder: Path) -> str:
    """Return the sha256 of the weights of a Hugging Face directory."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def model_digest(folder: Path) -> str:
    """Return the sha256 of all that decides the scores of a model: weights, configuration and tokenizer."""
    digest = hashlib.sha256(bytes.fromhex(weights_digest(folder)))
    for name in ("config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            digest.update(bytes.fromhex(file_sha256(folder / name)))
    return digest.hexdigest()


def huggingface_tokenizer(folder: str | Path, needed: Sequence[str] = ("pad_token",)) -> Any:
    """Load transformers' tokenizer of a model. Needed tokens that its files do not name are those that Detour finds.

    Raises:
        InputError: Neither names them, or the model has no embedding of some tokens.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    entries = json.loads((Path(folder) / "config.json").read_bytes()).get("vocab_size")
    tokens = 1 + max(tokenizer.get_vocab().values())
    if isinstance(entries, int) and tokens > entries:
        raise InputError(
            f"{folder}: its tokenizer has {tokens:,} tokens and its model {entries:,}; give each token a row with "
            "`model.resize_token_embeddings`, or take the model's own tokenizer",
            code="tokenizer-too-large",
        )
    unnamed = [key for key in needed if getattr(tokenizer, key) is None]
    if unnamed:
        found = load_tokenizer(str(folder)).role_tokens
        for key in unnamed:
            setattr(tokenizer, key, found[key])
    return tokenizer


_LOADING = Lock()


def load_model(kind: Any, folder: str | Path, **settings: Any) -> Any:
    """Load a Hugging Face model in fp32, for inference, onto the GPU if there is one.

    Threads load one after the other, because transformers replaces functions of torch meanwhile, for all threads. A
    model that another thread loads at that time may stay without weights, or get random ones.

    Args:
        kind: One of transformers' classes.
        folder: Hugging Face directory.
        settings: Further arguments of `from_pretrained`.

    Raises:
        InputError: A weight is not finite, of which nothing could be measured.
    """
    import torch

    with _LOADING:
        model = kind.from_pretrained(folder, dtype=torch.float32, **settings)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"{folder}: {name} holds values that are not finite; take an undamaged model or an older checkpoint",
                code="not-finite",
            )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def silence_transformers() -> None:
    """Turn off transformers' progress bars and its reports about weights that a task does not need."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def config_of_run(model: str) -> RunConfig | None:
    """Load the configuration of the run that a model lies in; None outside a run directory."""
    path = Path(model).absolute()
    for folder in (path, path.parent, path.parent.parent):
        config = RunDirectory(folder).config
        if config.is_file():
            return load_config(str(config))
    return None


def _export_or_checkpoint(directory: Path) -> Path:
    """Return the model in a run directory; any other directory as it is."""
    from engine.checkpoint import latest_valid

    run = RunDirectory(directory)
    if (run.export / "config.json").is_file():
        return run.export
    if not run.config.is_file():
        return directory
    newest, _ = latest_valid(run.checkpoints)
    if newest is None:
        raise InputError(f"{directory} is a run without a valid checkpoint; train it first", code="no-checkpoint")
    return newest


def _export(checkpoint: Path, folder: Path) -> Path:
    from engine.export import export_hf

    export_hf(checkpoint, folder, load_tokenizer(str(checkpoint)))
    return folder
