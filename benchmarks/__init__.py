"""Benchmarks; each module is a script, and `benchmarks/README.md` lists them."""
