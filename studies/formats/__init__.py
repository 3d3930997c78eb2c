"""Formats of task files: each reader yields the same examples."""
