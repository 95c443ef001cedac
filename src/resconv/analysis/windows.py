"""The strided window through which an output of some operations sees their input.

What one conv has in common with the operations that it is to stand for is the stride: the product of
those on the way. Which kernel and padding give the same sizes is then tried out on the real thing.
"""

from dataclasses import dataclass
from math import prod

from .graph import Graph, Node

__all__ = ["Window", "window"]

_POOLS = {
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool2d",
    "avg_pool2d",
    "avg_pool3d",
}


@dataclass(frozen=True)
class Window:
    """Sizes one a dimension: the stride, and how many inputs wide an output sees."""

    stride: tuple[int, ...]
    width: tuple[int, ...]

    def through(self, stride: tuple[int, ...], width: tuple[int, ...]) -> "Window":
        """Return the window of an operation behind this one."""
        wider = zip(self.width, self.stride, width, strict=True)
        return Window(
            tuple(a * b for a, b in zip(self.stride, stride, strict=True)),
            tuple(w + s * (k - 1) for w, s, k in wider),
        )


def window(graph: Graph, start: int, end: int, nodes: list[Node]) -> Window | str:
    """Return how ``end`` sees ``start`` through the nodes, or why no conv can do the same."""
    dims = len(graph.values[start].shape) - 2
    size = graph.values[start].shape[2:]
    # Of each value: its window, and the size at which it is one position a step of the window. A value
    # of other sizes (pooled, permuted) is on its way to somewhere, or is never used as a map again.
    found: dict[int, tuple[Window, tuple[int, ...]]] = {
        start: (Window((1,) * dims, (1,) * dims), size)
    }
    for node in nodes:
        read = [v for v in node.inputs if v in found]
        if not read or not node.outputs:
            continue
        shape = graph.values[node.outputs[0]].shape[2:]
        steps = _steps(graph, node, dims)
        # Of several inputs that one whose map the output still is; a wider view counts.
        read.sort(key=lambda v: (found[v][1] != shape, -prod(found[v][0].width)))
        seen, at = found[read[0]]
        if steps is not None and graph.values[read[0]].shape[2:] == at:
            seen, at = seen.through(*steps), shape
        for value in node.outputs:
            found[value] = seen, at
    made = graph.values[end].shape
    if end not in found:
        return "its output does not depend on its input"
    seen, at = found[end]
    if len(made) != dims + 2 or made[2:] != at:
        return f"no strided window turns size {_short(size)} into {_short(made[2:])}"
    return seen


def _steps(graph: Graph, node: Node, dims: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return stride and width of an operation that looks through a window, else None."""

    def each(value: object) -> tuple[int, ...]:
        numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
        sizes = tuple(n for n in numbers if isinstance(n, int))
        return sizes * dims if len(sizes) == 1 else sizes

    if node.op == "convolution":
        if node.args[6]:
            return None
        stride, dilation = each(node.args[3]), each(node.args[5])
        kernel = graph.values[node.inputs[1]].shape[2:]
        if len(kernel) != dims or len(stride) != dims:
            return None
        return stride, tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    if node.op in _POOLS:
        kernel = each(node.args[1])
        stride = each(node.args[2]) if len(node.args) > 2 and node.args[2] else kernel
        return (stride, kernel) if len(kernel) == len(stride) == dims else None
    if node.op == "constant_pad_nd" or "_pad" in node.op:
        return (1,) * dims, (1,) * dims
    return None


def _short(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))
