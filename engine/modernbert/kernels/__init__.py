"""Triton kernels; imported only where they can be built. `engine.modernbert.ops` chooses between them and torch."""
