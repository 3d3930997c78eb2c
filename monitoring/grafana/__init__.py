"""Grafana dashboards as code, and the JSON files written from it."""
