"""Random numbers that belong to a sample, not to a process.

Every draw is a hash of (seed, epoch, sample) and a counter, so crop, flip and mask of a sample are the same whichever rank or
worker meets it, in whichever batch. The hash is splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014).
"""

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # mix(seed + i * GOLDEN) is the i-th number of splitmix64 begun at `seed`


def mix(*words: int | NDArray[np.integer]) -> NDArray[np.uint64]:
    """Hashes integers, element by element where they are arrays (they broadcast), to 64 well-stirred bits."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = state + GOLDEN + np.asarray(word).astype(np.uint64)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(seeds_B: NDArray[np.uint64], *counters: int | NDArray[np.integer]) -> NDArray[np.float64]:
    """A number in [0, 1) for each seed and counter (seeds and counters broadcast)."""
    return (mix(seeds_B, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
