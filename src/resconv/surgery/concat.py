"""Concatenations: each slice of the channels may keep a factor of its own.

A concatenation ties nothing: its output is a row of slices, each with the factor of the value it
came from. Operations that work channel by channel hand the slices on; a convolution or a norm
absorbs one factor per channel. Whatever else reads the value collapses it: one factor for all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..analysis.graph import Graph, Node, data_of
from ..analysis.ops import NORMS
from .potentials import Potentials

__all__ = ["Slices", "by_input"]

_BY_CHANNEL = {
    "relu",
    "relu_",
    "leaky_relu",
    "leaky_relu_",
    "clone",
    "dropout",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
}


class Slices:
    """Which values are rows of slices: ``(channels, value whose factor it has)``."""

    def __init__(self, graph: Graph, ties: Potentials) -> None:
        self.graph, self.ties = graph, ties
        self.rows: dict[int, list[tuple[int, int]]] = {}

    def visit(self, node: Node, *, absorbs: Callable[[], bool]) -> bool:
        """Take the node in; True where its output is a row and nothing is left to tie.

        ``absorbs`` says whether the node can take one factor per channel of its input.
        """
        data = self.graph.table(data_of)[node.index]
        if node.op == "cat" and self._along_channels(node):
            self.rows[node.outputs[0]] = [
                s for v in node.inputs for s in self.rows.get(v, [(self._channels(v), v)])
            ]
            return True
        held = [v for v in data if v in self.rows]
        if not held:
            return False
        if node.op in _BY_CHANNEL and len(data) == 1:
            for value in node.outputs:
                self.rows[value] = self.rows[data[0]]
            return True
        transposed = node.op == "convolution" and bool(node.args[6])
        if not transposed and node.op in ("convolution", "gate", *NORMS) and absorbs():
            return False
        for value in held:
            self.collapse(value)
        return False

    def collapse(self, value: int) -> None:
        """Give all slices of the value one factor."""
        for _, part in self.rows.get(value, ()):
            self.ties.tie(part, value)

    def factors(self, value: int) -> float | Tensor:
        """Return the value's factor, or one a channel."""
        row = self.rows.get(value)
        if row is None:
            return self.ties.factor(value)
        each = [self.ties.factor(part) for _, part in row]
        if len(set(each)) == 1:
            return each[0]
        counts = torch.tensor([n for n, _ in row])
        return torch.tensor(each, dtype=torch.float64).repeat_interleave(counts)

    def _channels(self, value: int) -> int:
        return self.graph.values[value].shape[1]

    def _along_channels(self, node: Node) -> bool:
        values = self.graph.values
        dim = node.args[1] if len(node.args) > 1 else 0
        if any(values[v].constant or len(values[v].shape) < 3 for v in node.inputs):
            return False
        rank = len(values[node.inputs[0]].shape)
        return isinstance(dim, int) and dim % rank == 1


def by_input(factors: float | Tensor, weight: Tensor, groups: int) -> float | Tensor:
    """Shape factors of a convolution's input channels so that they divide its kernel."""
    if not isinstance(factors, Tensor):
        return factors
    factors = factors.to(weight.device).reshape(groups, -1)
    rows = factors.repeat_interleave(weight.shape[0] // groups, 0)
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
