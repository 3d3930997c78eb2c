"""Text -> shards -> exact, elastic streams -> packed -> masked batches. Knows nothing of the model."""
