"""Multiply-accumulates and parameters of a net."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from .inputs import batch_size, unwrap
from .recorder import record

__all__ = ["Profile", "count", "profile"]


@dataclass(frozen=True)
class Profile:
    """Multiply-accumulates of one forward pass at the example's batch size 1, and parameters.

    ``num_convs`` are the convolutions that the pass computes.
    """

    macs: int
    num_params: int
    num_convs: int = 0


def profile(model: nn.Module, example_inputs: Any) -> Profile:
    """Return the MACs of one forward pass, its convolutions, and the number of parameters.

    MACs are multiply-accumulates of convolutions and matrix products (torch's own formulas, two
    FLOPs each), divided by the example's batch size. Elementwise work is not counted.

    Example:
        >>> found = resconv.profile(net, images)
        >>> found.num_convs, found.num_params
        (3, 483)
    """
    model = unwrap(model)
    graph = record(model, example_inputs)
    return Profile(
        sum(node.macs for node in graph.nodes) // batch_size(example_inputs),
        sum(p.numel() for p in model.parameters()),
        sum(node.op == "convolution" for node in graph.nodes),
    )


count = profile  # its earlier name
