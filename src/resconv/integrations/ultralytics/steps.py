"""How many steps the optimizer of an ultralytics run takes."""

import numpy as np

__all__ = ["count_steps"]


def count_steps(num_batches: int, epochs: int, warmup: int, accumulate: int) -> int:
    """Return how often the optimizer steps in ``epochs`` epochs of ``num_batches`` batches.

    It steps once ``accumulate`` batches have been seen since its last step (``nbs / batch``, rounded).
    In the first ``warmup`` batches that number rises from 1, by the trainer's own formula.
    """
    steps, last = 0, -1
    for batch in range(num_batches * epochs):
        wanted = accumulate
        if warmup and batch <= warmup:
            wanted = max(1, int(np.interp(batch, [0, warmup], [1, accumulate]).round()))
        if batch - last >= wanted:
            steps, last = steps + 1, batch
    return steps
