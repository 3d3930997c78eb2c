"""The two ways a command ends badly."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: configuration, data or checkpoint. The message names the key or file and the remedy; exit code 2."""


class RunFailedError(Exception):
    """The run started and failed for a reason that is not its input; exit code 3."""
