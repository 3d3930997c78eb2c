"""Text -> shards -> exact, elastic streams -> packed rows -> masked batches. Knows nothing of the model."""
