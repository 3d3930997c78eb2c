"""The reports of a run: logs, events, telemetry, metrics endpoint, live progress, report, dashboards."""
