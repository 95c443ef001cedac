"""The layers of a net in the order in which they run, and what became of each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from torch import Tensor, nn

from resconv.analysis.inputs import evaluating
from resconv.planning.plan import Plan

__all__ = ["Group", "Layer", "computed_layers", "drawn", "judged"]

_KINDS = (nn.modules.conv._ConvNd, nn.Linear)
_PER_GROUP = 20  # layers that stand side by side on a phone
_TALLEST, _LEAST = 110, 0.05  # pixels; a share of them


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        what: its kind in words, such as "3x3 conv, stride 2".
        channels: of its output.
        side: the output's height and width, such as "32x32"; empty of a linear layer.
        kept: whether the compact net computes it.
        why: what decided that.
    """

    name: str
    what: str
    channels: int
    side: str
    kept: bool = True
    why: str = ""


@dataclass(frozen=True)
class Group:
    """Layers side by side whose outputs are of one size, and the heights of their bars."""

    side: str
    layers: tuple[Layer, ...]
    heights: tuple[float, ...]


def computed_layers(model: nn.Module, example: Tensor) -> list[Layer]:
    """Return the layers that a forward pass runs, in order; one that runs twice stands where it ran first."""
    found: dict[str, Layer] = {}

    def note(name: str, module: Any, out: Any) -> None:
        if name not in found and isinstance(out, Tensor):
            found[name] = _layer(name, module, out)

    handles = [
        module.register_forward_hook(lambda m, _, out, name=name: note(name, m, out))
        for name, module in model.named_modules()
        if isinstance(module, _KINDS)
    ]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _layer(name: str, module: Any, out: Tensor) -> Layer:
    if isinstance(module, nn.Linear):
        return Layer(name, "linear", module.out_features, "")
    kernel = "x".join(map(str, module.kernel_size))
    what = f"{kernel} {'depthwise ' if 1 < module.groups == module.in_channels else ''}conv"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        what = f"{kernel} transposed conv"
    if any(s != 1 for s in module.stride):
        what += f", stride {module.stride[0]}"
    return Layer(name, what, module.out_channels, "x".join(map(str, out.shape[2:])))


def judged(
    dense: Iterable[Layer],
    left: Iterable[str],
    plan: Plan,
    removed: Iterable[str],
    reasons: Mapping[str, str],
) -> list[Layer]:
    """Return the dense net's layers with what became of each.

    ``left`` are the names of the compact net's layers, ``removed`` the units that it lacks, and
    ``reasons`` say of units that cannot go why not.
    """
    names, gone = set(left), set(removed)
    found = []
    for layer in dense:
        kept = layer.name in names
        why = _why(layer.name, kept, plan, gone, reasons)
        found.append(Layer(layer.name, layer.what, layer.channels, layer.side, kept, why))
    return found


def _why(name: str, kept: bool, plan: Plan, gone: set[str], reasons: Mapping[str, str]) -> str:
    units = [u for u in plan.scales if u == name or name.startswith(f"{u}.")]
    if not kept:
        planned = [u for u in units if u in plan.remove] or [u for u in units if u in gone]
        if not planned:
            return "nothing reads what it gives any more"
        unit = planned[0]  # the widest: a block stands before its layers, or alone
        scale = plan.scales[unit]
        own = "its scale" if unit == name else f"the scale of {unit}"
        if unit not in plan.remove:
            return f"{unit} is inside of a removed unit"
        return f"{own} arrived at 0" if scale == 0 else f"{own} was {scale:.3g}, the least needed"
    if units:
        return "; ".join(f"scale of {u} {plan.scales[u]:.3g}" for u in units)
    return reasons.get(name, "no unit: nothing stands beside it that could take its place")


def drawn(layers: Sequence[Layer]) -> list[Group]:
    """Return the layers in groups of one output size, none wider than a phone.

    A bar's height is the square root of the layer's channels; a linear layer of many classes is no
    taller than the widest convolution.
    """
    widest = max((la.channels for la in layers if la.side), default=1)
    groups = []
    for side, members in groupby(layers, lambda layer: layer.side):
        run = tuple(members)
        parts = -(-len(run) // _PER_GROUP)
        ends = [len(run) * i // parts for i in range(parts + 1)]
        for start, end in pairwise(ends):
            part = run[start:end]
            heights = tuple(
                round(_TALLEST * max(_LEAST, min(1, la.channels / widest) ** 0.5), 1) for la in part
            )
            groups.append(Group(side, part, heights))
    return groups
