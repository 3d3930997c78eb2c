"""Imported once by the fork server, so that each test process starts with Megatron loaded."""

from engine.megatron import cpu

cpu.install()

import engine.trainer  # noqa: E402, F401
