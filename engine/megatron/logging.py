"""Megatron's log messages."""

from __future__ import annotations

import logging

EXPECTED = (
    "megatron.core.transformer.transformer_layer",  # the MLP is not a class of Megatron's
    "megatron.core.distributed.distributed_data_parallel",  # 0.19.2: the parameters' layout
    "megatron.core.dist_checkpointing.strategies.common",  # 0.19.2: the way checkpoints are loaded
)
"""Loggers that warn of what Detour does on purpose, each with its reason. A logger is named after its module."""


def silence_expected_warnings() -> None:
    """Raise the level of the loggers in EXPECTED to errors. Written for Megatron 0.16.1 and 0.19.2."""
    for name in EXPECTED:
        logging.getLogger(name).setLevel(logging.ERROR)
