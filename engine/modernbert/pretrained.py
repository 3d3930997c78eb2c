"""Weights of the ModernBERT family as they lie on disk, under one set of names.

Hugging Face directories (safetensors or `pytorch_model.bin`, whole or in parts), `ModernBertDecoderForCausalLM`, and
Composer's `.pt` files of FlexBERT are read alike. Pickles are read with `weights_only=True`, which runs no code.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import InputError

KEY = "model.init"
WRAPPERS = frozenset({"_orig_mod", "module", "model", "bert", "encoder"})
"""Components that torch.compile, DDP, Composer, FlexBERT and Hugging Face put around a parameter's own name."""
BODY = ("embeddings.", "layers.", "final_norm.")
QKV = re.compile(r"(model\.layers\.\d+\.attn\.)([qkv])_proj\.weight")
TIED_WEIGHT = "decoder.weight"
EMBEDDING = "model.embeddings.tok_embeddings.weight"
FIRST_MATRIX = "model.layers.0.attn.Wo.weight"
LFS_POINTER = b"version https://git-lfs"

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""dtypes of weights, by safetensors' names. Others hold quantized numbers, which mean nothing without their scales."""

Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Stored:
    """One tensor of the files: its shape, its dtype, and how to read it."""

    key: str
    """Name in the file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it, such as BF16."""
    read: Read

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


def canonical_name(key: str) -> str:
    """Return the name that `ModernBertForMaskedLM` has for a parameter, whatever wraps the model in the file.

    `module.model.bert.encoder.layers.0.attn.Wo.weight` becomes `model.layers.0.attn.Wo.weight`; the head of a decoder,
    `lm_head.dense.weight`, becomes `head.dense.weight`.
    """
    parts = [part for part in key.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts = parts[1:]
    name = ".".join(parts)
    if name.startswith("lm_head."):
        return "head." + name.removeprefix("lm_head.")
    return f"model.{name}" if name.startswith(BODY) else name


class PretrainedWeights:
    """The named tensors of one model; only headers are read until `tensor` is called.

    Args:
        path: A model directory, or a `.pt` or `.bin` file of Composer or torch.

    Raises:
        InputError: There are no weights, or a file is missing, truncated, a Git-LFS pointer, or holds pickled code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        by_name: dict[str, Stored] = {}
        for stored in _stored(path):
            name = canonical_name(stored.key)
            if name in by_name:
                raise InputError(
                    f"{KEY}: {path} holds {name} twice, as {by_name[name].key} and as {stored.key}",
                    key=KEY,
                    code="weights-ambiguous",
                )
            by_name[name] = stored
        self._by_name = _join_projections(by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by its canonical name."""
        return self._by_name[name].shape

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor by its canonical name.

        Raises:
            InputError: It holds numbers that are not finite, or cannot be read.
        """
        stored = self._by_name[name]
        tensor = stored.read()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{KEY}: {stored.key} in {self.path} holds values that are not finite; take an undamaged checkpoint",
                key=KEY,
                code="weights-not-finite",
            )
        return tensor

    def sha256(self) -> str:
        """Digest names and shapes of all tensors, and the values of vectors and of one matrix.

        They differ between any two trainings of a model, and are quickly read.
        """
        digest = hashlib.sha256()
        for name, stored in sorted(self._by_name.items()):
            digest.update(f"{name} {stored.shape}".encode())
            if stored.is_floating and (len(stored.shape) == 1 or name == FIRST_MATRIX):
                digest.update(self.tensor(name).float().numpy().tobytes())
        return digest.hexdigest()

    def require(self, shapes: Mapping[str, tuple[int, ...]], optional: Collection[str]) -> list[str]:
        """Check that the files and a model agree, name by name and shape by shape; return the names to start fresh.

        Args:
            shapes: Canonical name -> shape of every parameter of the model.
            optional: Names that may be missing, such as those of the prediction head.

        Raises:
            InputError: A parameter is missing or has another shape, or the files hold one that the model does not take.
        """
        missing = [name for name in shapes if name not in self]
        if lacking := [name for name in missing if name not in optional]:
            raise InputError(
                f"{KEY}: {self.path} lacks {_some(lacking)}; it holds {_some(sorted(self._by_name))}, which is not a "
                "whole ModernBERT",
                key=KEY,
                code="weights-missing",
            )
        for name, shape in shapes.items():
            if name in self and self.shape(name) != shape:
                raise InputError(
                    f"{KEY}: {name} in {self.path} has shape {self.shape(name)}, its config.json and the recipe's "
                    f"model section ask for {shape}; remove the overrides of the shape, or mend config.json",
                    key=KEY,
                    code="weights-shape",
                )
        if quantized := [name for name in shapes if name in self and self._by_name[name].dtype not in DTYPES.values()]:
            raise InputError(
                f"{KEY}: {self.path} holds {_some(quantized)} as {self._by_name[quantized[0]].dtype}, which is "
                f"quantized; take the model with weights in {', '.join(DTYPES.values())}",
                key=KEY,
                code="weights-quantized",
            )
        unread = [
            stored.key
            for name, stored in self._by_name.items()
            if name not in shapes and stored.is_floating and not _is_ignored(name)
        ]
        if unread:
            raise InputError(
                f"{KEY}: {self.path} holds {_some(unread)}, which Detour's ModernBERT has no place for (biases of "
                "norms and projections, untied decoders and further layers change what the model computes)",
                key=KEY,
                code="weights-unread",
            )
        self._require_tied()
        return missing

    def dropped(self) -> list[str]:
        """Keys of the classifiers in the files, which take no part in pretraining."""
        return [stored.key for name, stored in self._by_name.items() if name.startswith("classifier.")]

    def _require_tied(self) -> None:
        if TIED_WEIGHT not in self or EMBEDDING not in self:
            return
        if self.shape(TIED_WEIGHT) != self.shape(EMBEDDING) or not torch.equal(
            self.tensor(TIED_WEIGHT), self.tensor(EMBEDDING)
        ):
            raise InputError(
                f"{KEY}: {self.path} has a decoder weight of its own; Detour trains models whose decoder is tied to "
                "the embedding (tie_word_embeddings)",
                key=KEY,
                code="weights-untied",
            )


def _is_ignored(name: str) -> bool:
    return name.startswith("classifier.") or name == TIED_WEIGHT or name.endswith("rotary_emb.inv_freq")


def _join_projections(by_name: dict[str, Stored]) -> dict[str, Stored]:
    """Replace each decoder layer's q_proj, k_proj and v_proj by the Wqkv that an encoder has."""
    joined: dict[str, Stored] = {}
    for name, stored in by_name.items():
        match = QKV.fullmatch(name)
        if match is None:
            joined[name] = stored
        elif match[2] == "q":
            parts = [by_name.get(f"{match[1]}{letter}_proj.weight") for letter in "qkv"]
            present = [part for part in parts if part is not None]
            if len(present) == len(parts):
                joined[f"{match[1]}Wqkv.weight"] = _concatenated(present)
            else:
                joined[name] = stored  # `require` names what is missing
    return joined


def _concatenated(parts: Sequence[Stored]) -> Stored:
    """Return the matrices below each other, [sum of rows, columns], as one that is read on demand."""
    first = parts[0]
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Stored(first.key, shape, first.dtype, lambda: torch.cat([part.read() for part in parts]))


def _stored(path: Path) -> Iterator[Stored]:
    """Every tensor of the files of a model directory or file."""
    if path.is_file():
        yield from _pickled(path)
        return
    for name, index_name, reader in (
        ("model.safetensors", "model.safetensors.index.json", _safetensors),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", _pickled),
    ):  # where an index lies beside a whole file, transformers reads the whole file
        if (path / name).is_file():
            yield from reader(path / name)
            return
        if (path / index_name).is_file():
            for file in _parts(path, path / index_name):
                yield from reader(file)
            return
    raise InputError(
        f"{KEY}: {path} holds no model.safetensors and no pytorch_model.bin; give a whole model directory",
        key=KEY,
        code="weights-missing",
    )


def _parts(folder: Path, index: Path) -> list[Path]:
    """The files that an index names, each once."""
    _refuse_pointer(index)
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in dict.fromkeys(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{KEY}: {index} is not an index of weight files ({type(error).__name__}: {error}); download it again",
            key=KEY,
            code="weights-damaged",
        ) from None
    if lacking := [file.name for file in files if not file.is_file()]:
        raise InputError(
            f"{KEY}: {index.name} names {_some(lacking)}, which {folder} does not hold; download the model again",
            key=KEY,
            code="weights-missing",
        )
    return files


def _safetensors(file: Path) -> Iterator[Stored]:
    _refuse_pointer(file)

    def reader(key: str) -> Read:
        def read() -> Tensor:
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(key)
            return tensor

        return read

    try:
        with safe_open(file, framework="pt") as handle:
            found = [(key, handle.get_slice(key)) for key in handle.keys()]  # noqa: SIM118 (not a dict)
            stored = [Stored(key, tuple(piece.get_shape()), piece.get_dtype(), reader(key)) for key, piece in found]
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None
    yield from stored


def _pickled(file: Path) -> Iterator[Stored]:
    """Read a torch or Composer file; `weights_only=True` refuses whatever is not plain data."""
    _refuse_pointer(file)
    try:
        with torch.serialization.safe_globals([datetime.timedelta]):  # Composer keeps durations beside the weights
            zipped = zipfile.is_zipfile(file)  # files of torch before 1.6 are not, and cannot be memory-mapped
            content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises pickle, zip and runtime errors of its own
        raise _damaged(file, error) from None
    for step in ("state", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(step), dict):
            content = content[step]
    tensors = content.items() if isinstance(content, dict) else ()
    for key, tensor in tensors:
        if isinstance(tensor, Tensor):
            dtype = DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper())
            yield Stored(key, tuple(tensor.shape), dtype, tensor.clone)


def _refuse_pointer(file: Path) -> None:
    try:
        with file.open("rb") as content:
            head = content.read(len(LFS_POINTER))
    except OSError as error:
        raise _damaged(file, error) from None
    if head == LFS_POINTER:
        raise InputError(
            f"{KEY}: {file} is a Git-LFS pointer, not the file itself; run `git lfs pull` in its repository",
            key=KEY,
            code="git-lfs-pointer",
        )


def _damaged(file: Path, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(
        f"{KEY}: {file} cannot be read as weights ({reason}); download it, or save the model, again",
        key=KEY,
        code="weights-damaged",
    )


def _some(names: Collection[str]) -> str:
    """The first three names, and how many more there are."""
    first = ", ".join(list(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
