"""The launcher: commands, Ray cluster and workers, restarts."""
