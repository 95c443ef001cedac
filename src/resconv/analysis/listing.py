"""The units of a model: conv layers (layers.py) and residual branches (branches.py), with their costs."""

from dataclasses import replace
from typing import Any

from torch import nn

from ..nn.gates import is_leaf
from .branches import find_blocks
from .candidates import Unit
from .inputs import batch_size, unwrap
from .layers import find_layers
from .recorder import record

__all__ = [
    "units",
]


def units(model: nn.Module, example_inputs: Any) -> list[Unit]:
    """List every conv layer and residual branch, with its cost and, where it stays, the reason.

    The model is run once in eval mode and left as it was.

    Raises:
        TraceError: the model does not run on ``example_inputs``.
    """
    model = unwrap(model)
    graph = record(model, example_inputs, leaf=is_leaf)
    every = [*find_layers(model, graph), *find_blocks(model, graph)]
    batch = batch_size(example_inputs)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    every.sort(key=lambda c: order.get(c.conv or c.gate, 0))
    return [replace(c.unit, macs=c.unit.macs // batch) for c in every]
