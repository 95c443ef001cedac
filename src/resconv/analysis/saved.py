"""What autograd keeps of an operation's tensors for the backward pass, after torch's derivative formulas.

Memory that is kept may not be written to before the backward pass. An operation that is not listed
counts as keeping all that it reads and makes: a copy too many costs little, a wrong gradient much.
"""

from .graph import Graph, Node
from .ops import NORMS

__all__ = ["kept_for_backward"]

# Moves, sums and interpolations are linear: their backward pass needs sizes and indices alone.
_NOTHING = {
    "_reshape_alias",
    "_to_copy",
    "_unsafe_view",
    "add",
    "alias",
    "aliased_write",
    "arange",
    "as_strided",
    "bernoulli",
    "cat",
    "channel_shuffle",
    "clone",
    "constant_pad_nd",
    "copy",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "eq",
    "expand",
    "fill",
    "flip",
    "full",
    "full_like",
    "ge",
    "gt",
    "im2col",
    "le",
    "lift_fresh",
    "lt",
    "mean",
    "native_channel_shuffle",
    "ne",
    "neg",
    "new_empty",
    "new_full",
    "new_ones",
    "new_zeros",
    "ones",
    "ones_like",
    "permute",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat",
    "roll",
    "rsub",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "stack",
    "sub",
    "sum",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "upsample_bicubic2d",
    "upsample_bilinear2d",
    "upsample_linear1d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_trilinear3d",
    "view",
    "zero",
    "zeros",
    "zeros_like",
}
_INPUTS = {
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "abs",
    "addmm",
    "avg_pool2d",
    "avg_pool3d",
    "baddbmm",
    "bmm",
    "clamp",
    "clamp_max",
    "clamp_min",
    "convolution",
    "cos",
    "div",
    "elu",
    "gate",  # a ResConv, a gated norm or a product with the scale
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "linear",
    "log",
    "log_sigmoid_forward",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "mish",
    "mm",
    "mul",
    "native_group_norm",
    "native_layer_norm",
    "prelu",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "silu",
    "sin",
    "softplus",
    *NORMS,
}
_OUTPUT = {
    "_log_softmax",
    "_softmax",
    "exp",
    "reciprocal",
    "relu",
    "rsqrt",
    "sigmoid",
    "sqrt",
    "tanh",
}
# Of what is overwritten autograd keeps a copy, or these formulas use the result instead.
_OUTPUT_IN_PLACE = _OUTPUT | {"elu", "leaky_relu"}


def kept_for_backward(graph: Graph, node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the values among the node's inputs, and those among its outputs, that autograd keeps."""
    op = node.op if node.op.startswith("_") and node.op in _NOTHING else node.op.removesuffix("_")
    known = op in _NOTHING or op in _INPUTS or op in _OUTPUT
    if op in _NOTHING:
        return (), ()
    read = tuple(v for v in node.inputs if v not in node.writes)
    if op in ("mul", "div") and not node.writes and len(node.inputs) == 1:
        return (), ()  # times a number
    if node.writes:
        made = node.outputs if op in _OUTPUT_IN_PLACE or not known else ()
        return (() if op in _OUTPUT else read), made
    return (() if op in _OUTPUT else read), (node.outputs if op in _OUTPUT or not known else ())
