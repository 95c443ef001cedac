"""What each kind of unit weighs, from the times of whole nets that lack some of them.

One unit of a deep net saves less than the noise of one timing. A *weighing design* gets the most out
of few timings: every net lacks about half of all kinds, so every timing says something about every
kind. With n(i, k) units of kind k gone from net i, t the whole net's time and e(k) a unit's,

    time(i) = t - sum over k of n(i, k) e(k),    e(k) >= 0

is solved by least squares, each timing weighted by its own error. What the timings leave open falls
to a prior (the unit's share of the MACs) that is trusted within its own size.
(H. Hotelling, Some improvements in weighing and other experimental techniques, 1944.)
"""

import random

import numpy as np

__all__ = ["design", "solve"]

_MOST = 32


def design(kinds: int, seed: int = 0) -> list[frozenset[int]]:
    """Return which kinds each net lacks: none, all, and random halves."""
    everything = frozenset(range(kinds))
    subsets = [frozenset(), everything]
    source = random.Random(seed)
    # More nets than kinds, so that the timings contradict each other and their errors average out.
    for size in [kinds // 2, (kinds + 1) // 2] * min(_MOST // 2, kinds // 2 + 2):
        half = frozenset(source.sample(range(kinds), size))
        if half not in subsets:
            subsets.append(half)
    return subsets


def solve(
    counts: np.ndarray, times: np.ndarray, errors: np.ndarray, prior: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the whole net's time and that of one unit of each kind.

    Shapes: ``counts`` (nets, kinds), ``times`` and ``errors`` (nets,), ``prior`` (kinds,); the unit
    of all times is the same. The first net lacks nothing.
    """
    whole = float(times[0])
    trust = prior + 0.01 * whole
    rows = np.hstack([np.ones((len(times), 1)), -counts]) / errors[:, None]
    normal = rows.T @ rows
    right = rows.T @ (times / errors)
    kinds = np.arange(1, len(prior) + 1)
    normal[kinds, kinds] += 1 / trust**2
    right[kinds] += prior / trust**2
    # Coordinate descent keeps every unit's time from becoming negative.
    x = np.concatenate([[whole], prior])
    for _ in range(20_000):
        before = x.copy()
        for k in range(len(x)):
            x[k] = max(0.0, x[k] + (right[k] - normal[k] @ x) / normal[k, k])
        if np.abs(x - before).max() <= 1e-10 * whole:
            break
    return float(x[0]), x[1:]
