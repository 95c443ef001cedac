"""Where a positive factor can go: potentials on the values of a network.

Every value ``v`` of the compact net is ``f(v)`` times the value of the gated net. Homogeneous
operations tie the factors of what they read and make (``f`` equal); a removed layer, ``y = p * x``
with ``y`` and ``x`` now one value, demands ``f(x) = p * f(y)``; the net's inputs and outputs, and all
that touches a non-homogeneous operation, are pinned to 1; a linear layer absorbs any difference
between its two sides. So the factors are potentials (``log f``) on a graph of ties: a union-find
that keeps each value's offset to its root. A demand that contradicts the ties already made cannot
be absorbed, and stays as one multiply.
"""

import math

__all__ = ["Potentials"]


class Potentials:
    """Union-find over values with an offset (in log space) to each root. ``-1`` is the factor 1."""

    GROUND = -1

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}
        self._offset: dict[int, float] = {}

    def _find(self, v: int) -> tuple[int, float]:
        path, total = [], 0.0
        while self._parent.get(v, v) != v:
            path.append(v)
            v = self._parent[v]
        for node in reversed(path):
            total += self._offset[node]
            self._parent[node], self._offset[node] = v, total
        return v, (self._offset[path[0]] if path else 0.0)

    def tie(self, a: int, b: int, offset: float = 0.0) -> bool:
        """Demand ``log f(a) = log f(b) + offset``; False when earlier ties say otherwise."""
        root_a, off_a = self._find(a)
        root_b, off_b = self._find(b)
        if root_a == root_b:
            return math.isclose(off_a, off_b + offset, rel_tol=0.0, abs_tol=1e-12)
        # log f(a) = off_a + log f(root_a) must be off_b + offset + log f(root_b).
        self._parent[root_a], self._offset[root_a] = root_b, off_b + offset - off_a
        return True

    def pin(self, v: int) -> None:
        self.tie(v, self.GROUND)

    def factor(self, v: int) -> float:
        """Return ``f(v)``. A group tied to nothing fixed gets the factor 1 at its root."""
        root, offset = self._find(v)
        ground, ground_offset = self._find(self.GROUND)
        return math.exp(offset - ground_offset) if root == ground else math.exp(offset)
