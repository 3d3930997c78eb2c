"""Keys of a study that stand for several keys of the recipe, in the order in which they are applied."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import InputError
from configs.load import load_config
from configs.schema import RunConfig
from configs.units import parse_count

if TYPE_CHECKING:
    from transformers import ModernBertConfig

_architectures: dict[tuple[str, str], ModernBertConfig] = {}
BASE_WIDTH = 768
"""Hidden size of ModernBERT-base, which `lr_of_base` is the learning rate of."""


def load_derived(recipe: str, plain: Sequence[str], settings: dict[str, Any]) -> RunConfig:
    """Load a recipe with overrides, and apply the derived keys among the settings.

    Raises:
        InputError: A key or value is wrong.
    """
    overrides = list(plain)
    config = load_config(recipe, overrides)
    for key, translate in _TRANSLATE.items():
        if key not in settings:
            continue
        try:
            more = translate(config, settings[key])
        except (ValueError, TypeError) as error:
            raise InputError(f"{key}: {settings[key]!r} cannot be used: {error}", key=key) from None
        overrides += more
        config = load_config(recipe, overrides) if more else config
    return config


def architecture_of(config: RunConfig) -> ModernBertConfig:
    """Return the architecture of a run's model. The trials of a study have few different ones, which are kept."""
    key = config.model.model_dump_json(), config.tokenizer
    if key not in _architectures:
        from datapipe.tokenizer import load_tokenizer
        from engine.modernbert.config import resolve_architecture

        _architectures[key] = resolve_architecture(config.model, load_tokenizer(config.tokenizer))
    return _architectures[key]


def parameters_of(config: RunConfig) -> int:
    """Return the number of parameters of a run's model."""
    from engine.modernbert.config import parameter_count

    return parameter_count(architecture_of(config))


def _parameters(config: RunConfig, value: Any) -> list[str]:
    from datapipe.tokenizer import load_tokenizer
    from studies.sizes import model_shape

    shape = model_shape(parse_count(value), load_tokenizer(config.tokenizer).vocab_size)
    kept = f"tokenizer={config.tokenizer}"  # which the recipe may leave to the model that is no longer the start
    return ["model.init=scratch", "model.size=null", kept, *(f"model.{key}={number}" for key, number in shape.items())]


def _lr_of_base(config: RunConfig, value: Any) -> list[str]:
    """Scale the learning rate by 1 / width, as Adam's of hidden matrices does (Yang et al. 2022, arXiv 2203.03466)."""
    own = [number for number, phase in enumerate(config.phases) if phase.lr.peak is not None]
    if own:
        raise ValueError(f"phases.{own[0]}.lr.peak sets the rate of the phase; remove one of the two")
    return [f"optimizer.lr={float(value) * BASE_WIDTH / architecture_of(config).hidden_size:.3g}"]


def _tokens(config: RunConfig, value: Any) -> list[str]:
    """Give the last two phases a sum of tokens; each keeps its share."""
    first, last = config.spans[-2:] if len(config.phases) > 1 else (None, config.spans[-1])
    total = max(1, round(parse_count(value) / last.tokens_per_step))
    if first is None:
        return _length(0, total)
    if total < 2:
        raise ValueError("it is shorter than one step of each phase")
    decay = min(total - 1, max(1, round(total * last.steps / (first.steps + last.steps))))
    return [*_length(first.index, total - decay), *_length(last.index, decay)]


def _decay_share(config: RunConfig, value: Any) -> list[str]:
    """Divide the steps of the last two phases anew; their sum stays."""
    share = float(value)
    if not 0 < share < 1 or len(config.phases) < 2:
        raise ValueError("it is a share between 0 and 1 of the last two phases")
    last = len(config.phases) - 1
    steps = sum(span.steps for span in config.spans[-2:])
    decay = max(1, round(share * steps))
    return [*_length(last - 1, steps - decay), *_length(last, decay)]


def _decay_ratio(config: RunConfig, value: Any) -> list[str]:
    """Set the last phase's steps relative to those of the phase before, which keeps its length."""
    ratio = float(value)
    if ratio <= 0 or len(config.phases) < 2:
        raise ValueError("it is a positive ratio of the last phase to the one before")
    last = len(config.phases) - 1
    return _length(last, max(1, round(ratio * config.spans[-2].steps)))


def _decay_floor(config: RunConfig, value: Any) -> list[str]:
    """Lengthen the last phase to a number of updates, because a decay of fewer leaves the switch unfinished."""
    fewest = int(value)
    if fewest < 1:
        raise ValueError("it is a number of updates")
    last = config.spans[-1]
    return _length(last.index, fewest) if last.steps < fewest else []


def _length(phase: int, steps: int) -> list[str]:
    return [f"phases.{phase}.tokens=null", f"phases.{phase}.steps={steps}"]


def _frozen(phase: int) -> Callable[[RunConfig, Any], list[str]]:
    def frozen_share(config: RunConfig, value: Any) -> list[str]:
        start, end = map(float, value)
        depth = architecture_of(config).num_hidden_layers
        layers = list(range(round(start * depth), round(end * depth)))
        return [f"phases.{range(len(config.phases))[phase]}.freeze={json.dumps(layers)}"]

    return frozen_share


_TRANSLATE: dict[str, Callable[[RunConfig, Any], list[str]]] = {
    "parameters": _parameters,
    "lr_of_base": _lr_of_base,
    "tokens": _tokens,
    "decay_share": _decay_share,
    "decay_ratio": _decay_ratio,
    "decay_floor": _decay_floor,
    "frozen_share": _frozen(0),
    "frozen_share_of_decay": _frozen(-1),
}
DERIVED = tuple(_TRANSLATE)
"""The derived keys, as `Study.grid` describes them."""
