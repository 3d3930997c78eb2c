"""What a study may be pointed at: a run, a checkpoint, or a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from configs.errors import InputError
from configs.load import load_config
from configs.schema import RunConfig

EXPORT = "hf"
CONFIG = "config.yaml"


@contextmanager
def huggingface_directory(model: str) -> Iterator[Path]:
    """The Hugging Face directory of a model; that of a checkpoint exists as long as the context does.

    `model` is a run directory (its final export, else its newest checkpoint), a checkpoint, a Hugging Face directory or
    a hub id. Raises InputError where it is none of them.
    """
    from engine.checkpoint import latest_valid
    from engine.modernbert.config import CONFIG_FILE

    path = Path(model)
    if path.is_dir():
        if (path / EXPORT / "config.json").is_file():
            path = path / EXPORT
        elif (path / CONFIG).is_file():
            newest, _ = latest_valid(path / "checkpoints")
            if newest is None:
                raise InputError(f"{model} is a run without a checkpoint yet; train it first")
            path = newest
        if (path / CONFIG_FILE).is_file():
            with TemporaryDirectory(prefix="detour-") as folder:
                yield _export(path, Path(folder))
            return
    elif model.count("/") == 1 and not model.startswith((".", "/", "~")):
        path = _download(model)
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise InputError(
            f"{model} is no model: give a run directory, a checkpoint, a Hugging Face directory with config.json and "
            "safetensors weights, or a hub id such as answerdotai/ModernBERT-base"
        )
    yield path


def quiet() -> None:
    """Keep transformers from reporting on weights a task does not need, and from its progress bars."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_of(model: str) -> RunConfig | None:
    """The configuration of the run a model came from, where the model lies in a run directory."""
    path = Path(model).absolute()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / CONFIG).is_file():
            return load_config(str(folder / CONFIG))
    return None


def _export(checkpoint: Path, folder: Path) -> Path:
    from datapipe.tokenizer import load_tokenizer
    from engine.checkpoint import describe
    from engine.export import export_hf

    meta = describe(checkpoint)
    export_hf(checkpoint, folder, load_tokenizer(str((meta.config or {}).get("tokenizer") or meta.source)))
    return folder


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # the hub's client raises a family of network, HTTP and cache errors
        raise InputError(
            f"{hub_id} is neither a directory here nor to be had from the Hugging Face hub ({type(error).__name__})"
        ) from None
