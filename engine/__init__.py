"""ModernBERT on Megatron-Core: model, objectives, schedule, checkpoints and the training loop."""
