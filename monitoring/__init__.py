"""What a run tells about itself: JSONL logs, telemetry, the metrics endpoint, live progress and the report."""
