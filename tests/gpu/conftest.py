"""The process group of one that the engine's tests use."""

from tests.engine.conftest import alone

__all__ = ["alone"]
