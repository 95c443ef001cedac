"""The verb: a net in training form becomes ordinary layers."""

from typing import Any

from torch import nn

from ..errors import FusionError
from ..nn.gates import ResConv, gates
from . import folding
from .provenance import example_inputs_of, is_converted
from .pruning import operate

__all__ = ["fuse"]


def fuse(model: nn.Module, example_inputs: Any = None, *, fold_norms: bool = False) -> nn.Module:
    """Return a copy of ``model`` with every ResConv turned into an ordinary conv.

    Scales of residual branches go into the layers around them. Outputs change by rounding only;
    ``model`` is left as it was.

    Args:
        model: converted, or pruned with ``fuse=False``; or an ordinary net, to fold its norms.
        example_inputs: by default those that the net carries.
        fold_norms: fold every remaining BatchNorm that alone reads a conv into it as well (the
            form to deploy; it trains less well). Given the inputs of an ordinary net, that is done
            in any case: nothing else is left to fuse there.

    Raises:
        FusionError: a norm is in training mode, so no fixed kernel equals it.
            Call ``model.eval()`` first.
        PruneError: the model holds NaN or infinite numbers, or cannot be recorded any more.
        TraceError: norms are to be folded, and there are no example inputs.

    Example:
        >>> model = resconv.convert(net, images)
        >>> sum(isinstance(layer, nn.BatchNorm2d) for layer in resconv.fuse(model))
        0
    """
    # A training form whose units are all gone has no gates either.
    if gates(model) or is_converted(model):
        for name, gate in gates(model, fixed=True).items():
            if isinstance(gate, ResConv) and gate.norm is not None and gate.norm.training:
                raise FusionError(
                    f"The norm of {name} is in training mode, so no fixed kernel equals it. "
                    "Call model.eval() first."
                )
        model = operate(model, (), fuse=True)
        if not fold_norms:
            return model
    elif not fold_norms and example_inputs is None:
        raise FusionError(
            "The model has no ResConv to fuse. Convert it first, or say fold_norms=True to fold "
            "its BatchNorms into the convs before them."
        )
    return folding.fold_norms(model, example_inputs_of(example_inputs, model))
