"""What a run reports: logs, events, telemetry, metrics endpoint, live progress, report, dashboards."""
