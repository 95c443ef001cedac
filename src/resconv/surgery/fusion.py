"""The verb: a net in training form becomes ordinary layers."""

from typing import Any

from torch import nn

from ..analysis.inputs import unwrap
from ..errors import FusionError
from ..nn.gates import ResConv, gates
from .folding import fold_norms
from .pruning import operate

__all__ = ["fuse"]


def fuse(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Return a copy of ``model`` with every ResConv turned into an ordinary conv.

    Scales of residual branches go into the layers around them. With ``example_inputs``, every
    remaining BatchNorm that alone reads a conv is folded into it as well (the form to deploy; it
    trains less well). Outputs change by rounding only; ``model`` is left as it was.

    Raises:
        FusionError: a norm is in training mode, so no fixed kernel equals it.
            Call ``model.eval()`` first.
        PruneError: the model holds NaN or infinite numbers, or cannot be recorded any more.
    """
    # An open net whose units are all gone has no gates either, but still its edits to hand over.
    if gates(model) or getattr(unwrap(model), "resconv_state", None) is not None:
        for name, gate in gates(model, fixed=True).items():
            if isinstance(gate, ResConv) and gate.norm is not None and gate.norm.training:
                raise FusionError(
                    f"The norm of {name} is in training mode, so no fixed kernel equals it. "
                    "Call model.eval() first."
                )
        model = operate(model, (), fuse=True)
    elif example_inputs is None:
        raise FusionError(
            "The model has no ResConv to fuse. Convert it first, or give example_inputs to fold "
            "its BatchNorms into the convs before them."
        )
    return model if example_inputs is None else fold_norms(model, example_inputs)
