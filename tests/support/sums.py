"""Numbers whose sum shows in which order they were added, and the sum in the order that exact mode promises."""

import numpy as np


def wild(num_shards: int, num_values: int, *, seed: int = 0) -> np.ndarray:
    """float32 numbers of either sign from 1e-12 to 1e12: nearly all their sums depend on the order."""
    rng = np.random.default_rng(seed)
    magnitudes = 10.0 ** rng.uniform(-12, 12, (num_shards, num_values))
    close = rng.uniform(0.5, 2, (num_shards, num_values))
    numbers = np.where(np.arange(num_values) % 2, magnitudes, close)
    return (numbers * rng.choice([-1, 1], numbers.shape)).astype(np.float32)


def tree_sum(rows: np.ndarray) -> np.ndarray:
    """The left part of every sum has the largest power of two of shards that leaves some for the right part."""
    if len(rows) == 1:
        return rows[0]
    left = 1
    while left * 2 < len(rows):
        left *= 2
    return tree_sum(rows[:left]) + tree_sum(rows[left:])
