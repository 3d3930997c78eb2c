"""Studies: arms of runs compared, scaling laws, layer drift, downstream evaluation, and their reports."""
