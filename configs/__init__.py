"""The typed schema of a run and the shipped recipes. Imports nothing else of Detour."""
