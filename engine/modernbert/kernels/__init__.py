"""Triton kernels; imported only where they can be built. `engine.modernbert.fused` chooses between them and torch."""
