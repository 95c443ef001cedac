"""What a teacher can show besides its logits: the inputs of the layers that stay (FitNets' hints).

Removing whole layers leaves every stream of the net as wide as it was. So what stays whatever goes
(the layers between two stages, the pooling, the classifier) reads tensors of the same shape in the
dense net and in the one that gets shallower, and the layers in between can be trained to compute what
those that left did (Romero et al. 2015, arXiv 1412.6550). No layer has to be added to compare them.
"""

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..analysis.candidates import DEFAULT_KINDS, KINDS
from ..analysis.finding import find_units
from ..analysis.graph import Ref
from ..analysis.inputs import unwrap
from ..analysis.recorder import record
from ..errors import ModelError
from ..nn.gates import gates, is_leaf

__all__ = ["FeatureTap", "hint_layers"]


def hint_layers(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    """Return the names of the layers between which units lie, one for each tensor they read.

    These belong to no unit and change the size of what they read: in a ResNet the first conv of each
    stage, the pooling and the classifier. Those that read the input of the net itself, or are called
    more than once, are left out. ``model``, a dense or a converted one, is run once in eval mode
    and left as it was; the names hold for both.

    Raises:
        TraceError: the model does not run on ``example_inputs``.

    Example:
        >>> resconv.recovery.hint_layers(net, images)
        ('9', '11')
    """
    model = unwrap(model)
    graph = record(model, example_inputs, leaf=is_leaf)
    every = gates(model)  # in a net that has some, these are the units, whatever else could go
    found = find_units(model, graph, KINDS if every else DEFAULT_KINDS)
    found = [c for c in found if not every or c.unit.name in every]
    held = frozenset().union(*(c.nodes for c in found if c.unit.removable))
    parents = {c.parent.index for c in graph.calls if c.parent is not None}
    names: dict[int, str] = {}  # by the value that is read
    for call in graph.calls:
        path = call.path
        if not path or call.index in parents or not held.isdisjoint(range(call.start, call.end)):
            continue
        if len(graph.calls_of(path)) > 1 or len(graph.places(model, call.module)) > 1:
            continue
        if not (call.args and isinstance(call.args[0], Ref) and isinstance(call.output, Ref)):
            continue
        read, made = (graph.values[ref.value] for ref in (call.args[0], call.output))
        float_inside = read.dtype.is_floating_point and not read.constant
        if not float_inside or read.index in graph.inputs:
            continue
        if math.prod(read.shape) != math.prod(made.shape):
            names.setdefault(read.index, path)
    return tuple(names.values())


class FeatureTap(nn.Module):
    """Runs ``net`` and returns its output with the inputs of the named layers: ``(output, inputs)``.

    The net itself is not changed, and its parameters are those of the net.

    Raises:
        ModelError: the net has no layer of that name, or (when called) did not call it.

    Example:
        >>> logits, features = resconv.recovery.FeatureTap(net, ("9", "11"))(images)
        >>> [tuple(f.shape) for f in features]
        [(2, 4, 6, 6), (2, 4)]
    """

    def __init__(self, net: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.net = net
        self.names = names
        modules = dict(net.named_modules())
        missing = [n for n in names if n not in modules]
        if missing:
            raise ModelError(
                f"{type(net).__name__} has no layer named {', '.join(map(repr, missing[:5]))}. Take "
                "the names from resconv.recovery.hint_layers(model, example_inputs), of the same architecture."
            )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        seen: dict[str, Tensor] = {}

        def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        # For the time of the call: what is saved, copied or recorded carries no hooks.
        with ExitStack() as hooks:
            for name in self.names:
                layer = self.net.get_submodule(name)
                hooks.callback(layer.register_forward_pre_hook(partial(see, name)).remove)
            output = self.net(*args, **kwargs)
        missing = [n for n in self.names if n not in seen]
        if missing:
            raise ModelError(
                f"{type(self.net).__name__} did not call {', '.join(map(repr, missing[:5]))} in this pass."
            )
        return output, tuple(seen[n] for n in self.names)
