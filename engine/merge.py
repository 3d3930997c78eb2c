"""Averages the weights of models: `detour merge`.

A merge of checkpoints that were trained at a constant rate stands for a decay of the rate (WSM, arXiv
2507.17634). Let w_i be the rate, as a share of the peak, at which the i-th of n stretches between checkpoints would
have been trained. Then checkpoint i of n, from 0 and the oldest first, has the coefficient w_i - w_(i+1), with w_0 = 1
and w_n = 0. A linear decay gives equal coefficients. Evenly spaced checkpoints are assumed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import ModernBertConfig

from configs.errors import InputError, RunFailedError
from configs.files import partial_path
from datapipe.tokenizer import Tokenizer, load_tokenizer
from datapipe.vocabulary import first_difference
from engine import checkpoint as checkpoints
from engine.export import checkpoint_weights, import_hf, write_model
from engine.model_card import has_trained_masks, merge_card
from engine.modernbert.config import CONFIG_FILE, build_config, locate, read_config
from engine.modernbert.huggingface import encoder_config
from monitoring.run_directory import RunDirectory

MergeWeights = Literal["mean", "1-sqrt"]
COMPUTED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "layer_types",
    "local_attention",
    "rope_parameters",
    "norm_eps",
    "hidden_activation",
    "classifier_activation",
)
"""Fields of a configuration that decide what the weights compute."""


class Merged(NamedTuple):
    """The merge that was written."""

    shares: list[tuple[str, float]]
    """Name and coefficient of each model, in order; a run's oldest checkpoint comes first."""
    notes: list[str]
    """Reasons why the merge may not stand for the decay that was asked for."""


@dataclass(frozen=True)
class Origin:
    """One of the models that are merged."""

    name: str
    """Reference by which the user knows it."""
    architecture: ModernBertConfig
    tokenizer: Tokenizer
    knows_masks: bool
    """Whether its head was trained to fill masks."""
    read: Callable[[str], torch.Tensor]
    """Reads a whole tensor by its Hugging Face name, the fp32 main weights where there are any."""


def merge(
    models: Sequence[str],
    output: Path,
    show: Callable[[str], None] = lambda _: None,
    *,
    steps: int | None = None,
    weights: MergeWeights = "mean",
) -> Merged:
    """Write the merge of several models as a Hugging Face model and as a step-0 checkpoint.

    Args:
        models: Runs, of which the newest valid checkpoint is taken, checkpoints, and Hugging Face models. With `steps`
            one run.
        output: Directory to write, new or empty; it gets `hf` and `checkpoint`.
        show: Takes a note on the progress.
        steps: Number of the run's newest kept checkpoints to merge.
        weights: Decay that the merge of a run's checkpoints stands for.

    Raises:
        InputError: The models do not fit each other, one cannot be read, or `output` is not empty. Nothing is written.
        RunFailedError: The merge could not be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"--output: {output} is there already; name a new directory", key="--output", code="output-not-empty"
        )
    references = _references(models, steps, weights)
    origins = []
    for reference in references:
        show(f"checking {reference}")
        origins.append(_open(reference))
    _require_alike(origins)
    shares = coefficients(len(origins), weights)
    named = [(origin.name, share) for origin, share in zip(origins, shares, strict=True)]
    hidden = partial_path(output)
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        first = origins[0]
        card = merge_card(named, first.tokenizer, all(origin.knows_masks for origin in origins))
        config = encoder_config(first.architecture, torch.float32)
        write_model(hidden / "hf", config, merged_weights(origins, shares, show), first.tokenizer, card)
        show("writing the checkpoint")
        import_hf(str(hidden / "hf"), hidden / "checkpoint", source=str(output.absolute() / "hf"))
        hidden.rename(output)
    except (OSError, SafetensorError) as error:
        raise RunFailedError(f"{output} was not written: {error}") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return Merged(named, [] if steps is None else _notes(references))


def coefficients(count: int, weights: MergeWeights) -> list[float]:
    """Return the coefficients of `count` checkpoints, the oldest first; they add up to 1."""
    rates = [1 - (i / count if weights == "mean" else math.sqrt(i / count)) for i in range(count + 1)]
    return [rate - later for rate, later in pairwise(rates)]


def merged_weights(
    origins: Sequence[Origin], shares: Sequence[float], show: Callable[[str], None] = lambda _: None
) -> dict[str, torch.Tensor]:
    """Add up the origins' weights in fp64, one tensor at a time; return them in fp32 by their Hugging Face names.

    Raises:
        InputError: A tensor is missing, has another shape or holds numbers that are not finite.
    """
    from engine.modernbert.convert import parameter_shapes

    shapes = parameter_shapes(origins[0].architecture)
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        show(f"merging tensor {number + 1} of {len(shapes)}")
        total = torch.zeros(shape, dtype=torch.float64)
        for origin, share in zip(origins, shares, strict=True):
            tensor = origin.read(name)
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{origin.name}: {name} has shape {tuple(tensor.shape)}, its configuration asks for {shape}; take "
                    "an undamaged model",
                    code="weights-shape",
                )
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"{origin.name}: {name} holds values that are not finite; leave this model out, or take an "
                    "earlier checkpoint",
                    code="weights-not-finite",
                )
            total.add_(tensor, alpha=share)
        weights[name] = total.float()
    return weights


def _references(models: Sequence[str], steps: int | None, weights: MergeWeights) -> list[str]:
    if steps is None:
        if weights != "mean":
            raise InputError(
                f"--weights: {weights} is a decay over the checkpoints of one run; give one run and --steps N, or "
                "leave it out",
                key="--weights",
                code="weights-without-steps",
            )
        if len(models) < 2:
            raise InputError(
                f"{models[0]} alone is no merge; give --steps N for the run's N newest checkpoints, or more models",
                key="--steps",
                code="one-model",
            )
        return list(models)
    run = RunDirectory(Path(models[0]))
    if len(models) != 1 or not run.config.is_file():
        raise InputError(
            f"--steps: the checkpoints of one run are merged, and {', '.join(models)} is not one run directory; leave "
            "out --steps, or give one run",
            key="--steps",
            code="not-one-run",
        )
    kept = checkpoints.list_checkpoints(run.checkpoints)
    if len(kept) < steps:
        raise InputError(
            f"--steps: {models[0]} keeps {len(kept)} checkpoints, {steps} were asked for; ask for fewer, or train with "
            "a larger checkpoint.keep or with checkpoint.keep_every",
            key="--steps",
            code="too-few-checkpoints",
        )
    return [str(path) for path in reversed(kept[:steps])]


def _notes(paths: Sequence[str]) -> list[str]:
    metas = [checkpoints.describe(Path(path)) for path in paths]
    steps = [meta.step for meta in metas]
    notes = []
    if len({later - step for step, later in pairwise(steps)}) > 1:
        notes.append(
            f"the steps {', '.join(map(str, steps))} are unevenly spaced; the coefficients assume even intervals"
        )
    if len({meta.phase for meta in metas}) > 1:
        notes.append("the checkpoints are of different phases; a merge stands for a decay of one phase")
    return notes


def _open(reference: str) -> Origin:
    """Open a model by its headers; a checkpoint's digests are checked."""
    path = Path(reference)
    run = RunDirectory(path)
    if run.config.is_file():
        path = checkpoints.latest_of_run(path)
    if (path / CONFIG_FILE).is_file():
        return _open_checkpoint(path)
    from engine.modernbert.convert import parameter_shapes
    from engine.modernbert.pretrained import PretrainedWeights

    architecture = build_config(read_config(reference), reference)
    folder = locate(reference)
    stored = PretrainedWeights(folder)
    stored.require(parameter_shapes(architecture), ())
    tokenizer = _tokenizer(folder if folder.is_dir() else folder.parent, reference)
    return Origin(reference, architecture, tokenizer, True, stored.tensor)


def _open_checkpoint(path: Path) -> Origin:
    meta = checkpoints.verify(path)
    architecture = ModernBertConfig(**meta.architecture)
    tokenizer, read = _tokenizer(path, str(path)), checkpoint_weights(path, architecture)
    return Origin(str(path), architecture, tokenizer, has_trained_masks(meta), read)


def _tokenizer(place: Path, model: str) -> Tokenizer:
    """Load the tokenizer of a model from its directory or checkpoint."""
    try:
        return load_tokenizer(str(place))
    except InputError as error:
        raise InputError(
            f"{model}: its tokenizer cannot be had ({error}); put tokenizer.json into its directory",
            key="tokenizer",
            code=error.code,
        ) from None


def _require_alike(origins: Sequence[Origin]) -> None:
    """Raise InputError where a model computes something else than the first, or has other tokens."""
    first = origins[0]
    for other in origins[1:]:
        differing = [
            f"{key} {getattr(first.architecture, key)} and {getattr(other.architecture, key)}"
            for key in COMPUTED
            if getattr(first.architecture, key) != getattr(other.architecture, key)
        ]
        if differing:
            raise InputError(
                f"{first.name} and {other.name} are models of another architecture ({', '.join(differing)}); merge "
                "models that were trained from the same start",
                key="model",
                code="models-differ",
            )
        difference = first_difference(first.tokenizer, other.tokenizer)
        if difference is None:
            difference = first_difference(other.tokenizer, first.tokenizer)
        if difference is not None:
            raise InputError(
                f"{first.name} and {other.name} have other tokenizers ({difference}); merge models of one tokenizer",
                key="tokenizer",
                code="tokenizers-differ",
            )
