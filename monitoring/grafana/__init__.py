"""Grafana dashboards as code, and the JSON files that come of it."""
