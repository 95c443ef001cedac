"""What each ATen operation does to a positive factor and to the range of its values.

    linear       reads one value with constant weights: any factor can be absorbed between in and out
    homogeneous  f(a x) = a f(x) for a > 0: a factor passes through, all values tied
    product      value times value: the factor passes through the first, the others keep theirs
    affine_out   the input's factor is fixed, the output's can be absorbed (LayerNorm's own affine)
    opaque       everything else: no factor may enter or leave

An operation that is not listed is opaque: the analysis then refuses, it never guesses.
"""

import math
from collections.abc import Sequence

from .graph import Graph, Node, Ref

__all__ = ["NORMS", "bounds", "clamp_limits", "is_identity", "kind", "weight_values"]

NORMS = {
    "native_batch_norm",
    "batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
}
_MATMULS = {"addmm", "mm", "linear"}

# Same numbers, maybe elsewhere in memory: a shortcut through these is still the identity.
_IDENTITY = {
    "alias",
    "clone",
    "contiguous",
    "detach",
    "detach_",
    "lift_fresh",
    "_to_copy",
    "dropout",
    "to",
}
_ZERO_LEAVES = {"add", "add_", "sub", "sub_"}
_MOVES = {
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "permute",
    "transpose",
    "t",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "cat",
    "stack",
    "squeeze",
    "squeeze_",
    "unsqueeze",
    "unsqueeze_",
    "transpose_",
    "t_",
    "as_strided_",
    "flip",
    "roll",
    "index_select",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle",
    "im2col",
    "unfold",
    "repeat",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_max_pool2d",
    "mean",
    "upsample_nearest2d",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "relu",
    "relu_",
    "amax",
}
_ALSO_HOMOGENEOUS = {"sum", "upsample_bilinear2d", "upsample_bicubic2d", "leaky_relu", "abs", "neg"}
_LIMITED = {  # least and greatest value of the output, whatever the input
    "sigmoid": (0.0, 1.0),
    "sigmoid_": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "hardsigmoid_": (0.0, 1.0),
    "_softmax": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
}


def is_identity(node: Node) -> bool:
    """Whether the first output holds the first input's numbers, in the same shape."""
    if node.op in _ZERO_LEAVES and len(node.inputs) == 1 and len(node.args) == 2:
        # sum([a, b]) begins with 0 + a.
        first, second = node.args
        return isinstance(first, Ref) and _is_number(second) and second == 0
    return node.op in _IDENTITY and (node.op != "_to_copy" or "dtype" not in node.kwargs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def weight_values(node: Node) -> tuple[int | None, int | None]:
    """Return the values of the weight and the bias of a linear operation."""

    def value(i: int) -> int | None:
        found = node.args[i] if i < len(node.args) else None
        return found.value if isinstance(found, Ref) else None

    if node.op in ("convolution", "linear") or node.op in NORMS:
        return value(1), value(2)
    if node.op == "addmm":
        return value(2), value(0)
    if node.op == "mm":
        return value(1), None
    return None, None


def kind(graph: Graph, node: Node) -> str:
    """Classify a node; see the module's header."""
    if node.index not in graph.kinds:
        graph.kinds[node.index] = _kind(graph, node)
    return graph.kinds[node.index]


def _kind(graph: Graph, node: Node) -> str:
    op = node.op.removesuffix("_") if node.op.endswith("_") else node.op
    data = [v for v in node.inputs if not graph.values[v].constant]
    if not data:
        return "constant"
    if node.op in ("convolution", *NORMS):
        first = node.args[0]
        one = len(data) == 1 and isinstance(first, Ref) and first.value == data[0]
        scaling = node.op == "convolution" or isinstance(node.args[1], Ref)
        return "linear" if one and scaling else "opaque"
    if node.op in _MATMULS:
        weight, _ = weight_values(node)
        ok = len(data) == 1 and weight is not None and graph.values[weight].constant
        plain = not node.kwargs or node.op != "addmm"
        return "linear" if ok and plain else "opaque"
    if is_identity(node):
        return "homogeneous"
    if op in ("add", "sub"):
        # A constant summand has no factor to give up.
        tensors = sum(isinstance(a, Ref) for a in node.args)
        return (
            "homogeneous"
            if tensors == 2 == len([*node.inputs]) and len(data) == len(dict.fromkeys(node.inputs))
            else "opaque"
        )
    if op in ("mul", "div"):
        read = [a.value for a in node.args if isinstance(a, Ref)]
        if len(read) == 1:
            scalar = next((a for a in node.args if isinstance(a, int | float)), None)
            first_is_value = isinstance(node.args[0], Ref)
            if scalar is not None and (op == "mul" or first_is_value):
                return "homogeneous"
            return "opaque"
        if len(data) == 1:
            return "homogeneous" if op == "mul" or read[0] == data[0] else "opaque"
        return "product" if op == "mul" and read[0] != read[1] else "opaque"
    if node.op in ("constant_pad_nd",):
        value = node.args[2] if len(node.args) > 2 else 0
        return "homogeneous" if value == 0 else "opaque"
    if op in ("native_layer_norm", "native_group_norm"):
        position = 2 if op == "native_layer_norm" else 1
        weight = node.args[position] if len(node.args) > position else None
        return "affine_out" if isinstance(weight, Ref) and len(data) == 1 else "opaque"
    if op in _MOVES or op in _ALSO_HOMOGENEOUS or node.op in _IDENTITY:
        return "homogeneous" if len(data) == len(dict.fromkeys(node.inputs)) else "opaque"
    return "opaque"


def clamp_limits(node: Node) -> tuple[float, float] | None:
    """Return the limits of an operation that only clamps its first input, or None."""
    op = node.op.removesuffix("_")
    if op == "relu":
        return 0.0, math.inf
    if op not in ("hardtanh", "clamp"):
        return None
    given = dict(zip(("min", "max"), node.args[1:], strict=False))
    given |= {k.removesuffix("_val"): v for k, v in node.kwargs.items()}
    low, high = (-1.0, 1.0) if op == "hardtanh" else (-math.inf, math.inf)
    found = []
    for name, default in (("min", low), ("max", high)):
        limit = given.get(name)
        if not isinstance(limit, int | float | None):
            return None
        found.append(default if limit is None else float(limit))
    return (found[0], found[1]) if found[0] <= found[1] else None


def bounds(graph: Graph, node: Node, known: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the least and greatest value the node's outputs can have.

    ``known`` holds the bounds of every earlier value.
    """
    everything = (-math.inf, math.inf)
    op = node.op.removesuffix("_")
    ins = [known[v] for v in node.inputs]
    if node.op in _LIMITED:
        return _LIMITED[node.op]
    if (limits := clamp_limits(node)) is not None:
        low, high = (min(max(limit, limits[0]), limits[1]) for limit in ins[0])
        return low, high
    if op in _MOVES or node.op in _IDENTITY or is_identity(node):
        return min(i[0] for i in ins), max(i[1] for i in ins)
    if node.op == "constant_pad_nd" and kind(graph, node) == "homogeneous":
        return min(ins[0][0], 0.0), max(ins[0][1], 0.0)
    if op == "add" and len(ins) == 2 and not node.kwargs:
        return ins[0][0] + ins[1][0], ins[0][1] + ins[1][1]
    if op == "mul" and len(ins) == 2 and ins[0][0] >= 0 and ins[1][0] >= 0:
        return 0.0, _times(ins[0][1], ins[1][1])
    return everything


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b
