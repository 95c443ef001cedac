"""Branches for training alone: parallel linear layers that the net's own code merges into one conv.

RepVGG, MobileOne, RepViT and the YOLO that re-parameterise train sums of convs and norms, and deploy
one conv in their place. Such a module has a method for it; what it sums shows in the record: an
addition of values that linear layers alone computed from the module's input. A ``fuse`` that
merely puts a BatchNorm into its conv has no such addition, and does not count.
"""

from torch import nn

from .graph import Call, Graph, Node
from .ops import NORMS, is_identity

__all__ = ["MERGE_METHODS", "find_merging", "merge_method"]

MERGE_METHODS = (
    "reparameterize",
    "reparameterise",
    "switch_to_deploy",
    "fuse_convs",
    "fuse_repvgg_block",
    "merge_kernel",
    "fuse",
)
_PASSES = {"mul", "constant_pad_nd", "avg_pool2d"}


def merge_method(module: nn.Module) -> str | None:
    """Return the name of the method that merges the module's branches, or None."""
    own = (n for n in MERGE_METHODS if callable(getattr(type(module), n, None)))
    return next(own, None)


def find_merging(graph: Graph) -> list[str]:
    """Return the paths of the modules whose branches are for training alone, outermost first."""
    found: list[str] = []
    for call in graph.calls:
        if not call.path or merge_method(call.module) is None:
            continue
        if any(call.path == p or call.path.startswith(p + ".") for p in found):
            continue
        inside = graph.nodes[call.start : call.end]
        if any(_sums_linear(graph, call, node) for node in inside):
            found.append(call.path)
    return found


def _sums_linear(graph: Graph, call: Call, add: Node) -> bool:
    """Whether the node adds up values that linear layers compute from one value, and two layers at least."""
    if add.op not in ("add", "add_") or len(add.inputs) != 2:
        return False
    if not _nearest(graph, call, add):
        return False
    sides = [_behind(graph, call, value) for value in add.inputs]
    layers = sum(1 for side in sides if side is not None and side[1])
    starts = [side[0] for side in sides if side is not None]
    return len(starts) == 2 and starts[0] == starts[1] and layers > 0


def _nearest(graph: Graph, call: Call, node: Node) -> bool:
    """Whether no module inside the call, with such a method itself, holds the node."""
    inner: Call | None = node.call
    while inner is not None and inner is not call:
        if merge_method(inner.module) is not None:
            return False
        inner = inner.parent
    return inner is call


def _behind(graph: Graph, call: Call, value: int) -> tuple[frozenset[int], bool] | None:
    """Return what the value is computed from inside the call, and whether by a layer; None if not linearly."""
    sources, layered, stack = set(), False, [value]
    while stack:
        v = stack.pop()
        if graph.values[v].constant:
            continue
        node = graph.producer(v)
        if node is None or not call.holds(node):
            sources.add(v)
            continue
        if node.op in ("convolution", *NORMS):
            layered = True
        elif not (node.op in ("add", "add_", *_PASSES) or is_identity(node)):
            return None
        stack.extend(node.inputs)
    return frozenset(sources), layered
