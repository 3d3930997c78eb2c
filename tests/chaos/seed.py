"""The seed of the chaos tests' faults."""

from __future__ import annotations

import os
import random


def drawn() -> random.Random:
    """Return a generator from DETOUR_CHAOS_SEED, or from a drawn seed; either is printed, to repeat a failure."""
    seed = int(os.environ.get("DETOUR_CHAOS_SEED") or random.randrange(2**32))
    print(f"faults drawn with DETOUR_CHAOS_SEED={seed}", flush=True)
    return random.Random(seed)
