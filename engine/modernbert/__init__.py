"""ModernBERT (arXiv 2412.13663) built from Megatron-Core's specs."""
