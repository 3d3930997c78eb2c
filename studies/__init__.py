"""Studies: grids of runs, paired comparisons, scaling laws, layer drift, downstream tasks, and their reports."""
