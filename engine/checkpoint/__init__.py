"""Checkpoints: `format` and `meta` describe one, `writer` and `mirror` store it, `manager` decides when and which."""

from engine.checkpoint.format import (
    clear_partial,
    describe,
    expired,
    lasting,
    latest_of_run,
    latest_valid,
    list_checkpoints,
    load,
    prune,
    set_aside,
    sharded_weights,
    step_directory,
    step_of,
    verify,
)
from engine.checkpoint_meta import CheckpointMeta

__all__ = [
    "CheckpointMeta",
    "clear_partial",
    "describe",
    "expired",
    "lasting",
    "latest_of_run",
    "latest_valid",
    "list_checkpoints",
    "load",
    "prune",
    "set_aside",
    "sharded_weights",
    "step_directory",
    "step_of",
    "verify",
]
