"""Modules in whose place one conv can stand, found in a record: one tensor in, one out.

    segment   y = K(x) + s * (F(x) - K(x))   K: dense k x k, 1 x 1, or depthwise and 1 x 1
    gate      y = x + s * (x * g(x) - x)     F: squeeze-and-excite and its kin; leaves x

Nothing here looks at the class of a module. A module is offered where its conv costs at most half of
it, and where the units inside it do not reach nearly the same: the stage around blocks that can all go
is none, a block without a shortcut is one, and so is one of branches that leave a conv each. A single
conv that changes the shape is one where nothing around it is.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..nn.gates import Segment
from ..nn.shortcuts import Shortcut
from .branches import params_of
from .candidates import Candidate, Unit, why_untouchable
from .factors import value_ranges
from .graph import Call, Graph, Node, Ref
from .inputs import evaluating
from .ops import NORMS
from .recorder import restored
from .windows import Window, window

__all__ = ["ACTIVATIONS", "activation_of", "find_segments", "gated_segments", "with_shortcut"]

_MOST_LEFT = 0.5  # of a segment's MACs
# Of what a segment saves: if the units inside it save that, and leave few convs, they are enough.
_NEARLY, _FEW = 0.9, 2
# A module of more MACs and more convs than this is the net, not a part of it.
_MOST_OF_NET, _MANY = 0.5, 8
_LIKELY = 0.01  # of the net's MACs: what is smaller gets no reason


def gated_segments(graph: Graph) -> list[Candidate]:
    """Return the segments and gates of a recorded model that has them already."""
    found = []
    for call in graph.calls:
        gate = call.module
        if not isinstance(gate, Segment):
            continue
        inner = [c for c in graph.calls if c.parent is call]
        nodes = _within(graph, [c for c in inner if c.module is gate.module])
        left = _within(graph, [c for c in inner if c.module is gate.left])
        macs = sum(graph.nodes[i].macs for i in nodes) - sum(graph.nodes[i].macs for i in left)
        size = sum(p.numel() for p in gate.module.parameters())
        size -= sum(p.numel() for p in gate.left.parameters())
        unit = Unit(
            gate.unit or call.path,
            gate.kind,
            macs,
            size,
            gate.removable,
            gate.reason,
            _in_words(gate),
            gate.residual,
        )
        found.append(Candidate(unit, gate=call.path, nodes=nodes, left_nodes=left))
    return found


def _in_words(gate: Segment) -> str:
    convs = [m for m in gate.left.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    if not convs:
        return "its input"
    kind = "separable" if len(convs) > 1 else "dense"
    first, last = convs[0], convs[-1]
    size = (first.kernel_size, first.stride, (0,) * len(first.stride))
    return str(Shortcut(kind, first.in_channels, last.out_channels, *size))


def _within(graph: Graph, calls: list[Call]) -> frozenset[int]:
    return frozenset(i for c in calls for i in range(c.start, c.end))


def find_segments(
    model: nn.Module,
    graph: Graph,
    others: Sequence[Candidate],
    indexed: set[int],
    *,
    kinds: Iterable[str] = ("segment", "gate"),
    shortcuts: Sequence[str],
) -> list[Candidate]:
    """Return the segments and gates of a recorded model without any gates.

    ``others`` are the units of other kinds that were asked for, ``shortcuts`` the kinds of layers that
    may come in a segment's place, the best first.
    """
    kinds = tuple(kinds)
    whole = sum(n.macs for n in graph.nodes)
    free = [c for c in others if c.unit.removable]
    found: list[Candidate] = []
    refused: list[Candidate] = []
    calls = [c for c in graph.calls if c.path and c.end > c.start and isinstance(c.output, Ref)]
    if "gate" in kinds:
        found += [g for c in calls if (g := _gate(model, graph, c, indexed)) is not None]
    if "segment" not in kinds:
        return found
    seen: list[Candidate] = []
    for call in sorted(calls, key=lambda c: (c.end - c.start, c.start)):
        made = _segment(model, graph, call, indexed, shortcuts)
        if made is None:
            continue
        if not made.unit.removable:
            if made.unit.macs >= _LIKELY * whole:
                refused.append(made)
            continue
        if _crosses(made, free):
            continue
        # A module that does nothing but call another is the same segment under another name.
        if any(made.nodes == c.nodes for c in (*seen, *free, *found)):
            continue
        share = sum(graph.nodes[i].macs for i in made.nodes) / max(1, whole)
        if share > _MOST_OF_NET and _convs(graph, made) > _MANY:
            continue
        inside = [*free, *(c for c in seen if _convs(graph, c) > 1)]
        saved, convs = _without(graph, made, inside)
        if saved < _NEARLY * made.unit.macs or convs > _FEW:
            seen.append(made)
    # A conv inside something that can go as a whole needs no conv of its own.
    kept = [
        c
        for c in seen
        if _convs(graph, c) > 1 or not any(c.nodes < o.nodes for o in (*free, *seen))
    ]
    held = [c.nodes for c in (*kept, *free)]
    refused = [c for c in refused if not any(c.nodes & nodes for nodes in held)]
    return [*found, *kept, *refused]


def _convs(graph: Graph, c: Candidate) -> int:
    return sum(graph.nodes[i].op == "convolution" for i in c.nodes)


def _crosses(made: Candidate, others: list[Candidate]) -> bool:
    return any(
        made.nodes & c.nodes and not (made.nodes <= c.nodes or c.nodes <= made.nodes)
        for c in others
    )


def _without(graph: Graph, made: Candidate, others: list[Candidate]) -> tuple[int, int]:
    """Return what the units inside a segment save together, and how many convs are left then."""
    inside = [c for c in others if c.nodes < made.nodes]
    outermost = [c for c in inside if not any(c.nodes < o.nodes for o in inside)]
    gone = frozenset().union(*(c.nodes for c in outermost))
    segments = [c for c in outermost if c.unit.kind == "segment"]
    left = sum(sum(graph.nodes[i].macs for i in c.nodes) - c.unit.macs for c in segments)
    convs = sum(graph.nodes[i].op == "convolution" for i in made.nodes - gone) + len(segments)
    return sum(graph.nodes[i].macs for i in gone) - left, convs


def _region(graph: Graph, call: Call) -> tuple[int, int, list[Node]] | str | None:
    """Return what the call reads and makes, and its operations; why that is no unit, or None."""
    if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], Ref):
        return None
    assert isinstance(call.output, Ref)
    x, y = call.args[0].value, call.output.value
    values = graph.values
    if x == y or values[x].constant or len(values[x].shape) not in (3, 4, 5):
        return None
    inside = range(call.start, call.end)
    nodes = [graph.nodes[i] for i in inside]
    last = graph.producer(y)
    if last is None or last.index not in inside:
        return None
    for node in nodes:
        if any(values[v].memory == values[x].memory for v in node.writes):
            return "it writes into its input"
        for v in node.inputs:
            made = graph.producer(v)
            inner = made is not None and made.index in inside
            if v != x and not inner and not values[v].constant:
                return "it reads more than its input"
        for v in node.outputs:
            if values[v].constant:
                continue
            outside = [u for u in graph.users.get(v, []) if u.index not in inside]
            if v != y and (outside or v in graph.outputs):
                return "an inner value of it is used outside it"
    return x, y, nodes


def _usable(model: nn.Module, graph: Graph, call: Call, indexed: set[int]) -> str | None:
    reason = why_untouchable(model, graph, call.path)
    if reason is None and id(call.module) in indexed:
        reason = f"code reads the layers of {call.path} by index"
    return reason


def _segment(
    model: nn.Module, graph: Graph, call: Call, indexed: set[int], shortcuts: Sequence[str]
) -> Candidate | None:
    found = graph.nodes[call.start : call.end]
    macs = sum(n.macs for n in found)
    if not macs or not any(n.op == "convolution" for n in found):
        return None
    region = _region(graph, call)
    if region is None:
        return None
    if isinstance(region, str):
        return _refused(call, macs, region)
    x, y, nodes = region
    a, b = graph.values[x].shape, graph.values[y].shape
    if len(a) != len(b) or a[0] != b[0]:
        return None
    if a == b and sum(n.op == "convolution" for n in nodes) == 1:
        return None  # an identity is what can be left of it
    reason = _usable(model, graph, call, indexed)
    seen = window(graph, x, y, nodes)
    if reason is not None or isinstance(seen, str):
        return _refused(call, macs, reason or str(seen))
    norm = any(n.op in NORMS for n in nodes)
    act = activation_of(graph, y, call)
    positions = math.prod(b[2:]) * b[0]
    options = []
    sizes = _sizes(call, graph, x, b)
    for kind in shortcuts:
        fits = _fitting(seen, kind, sizes)
        if fits is None:
            continue
        kernel, padding = fits
        made = Shortcut(kind, a[1], b[1], kernel, seen.stride, padding, norm, act)
        if made.macs_each * positions <= _MOST_LEFT * macs:
            options.append(made)
    if not options:
        return None
    chosen = options[0]
    region_params = params_of(model, graph, nodes) - chosen.num_params
    unit = Unit(
        call.path,
        "segment",
        macs - chosen.macs_each * positions,
        region_params,
        True,
        None,
        str(chosen),
    )
    return Candidate(
        unit,
        gate=call.path,
        value=x,
        nodes=frozenset(range(call.start, call.end)),
        shortcut=chosen,
        options=tuple(options),
        positions=positions,
    )


def _refused(call: Call, macs: int, reason: str) -> Candidate:
    unit = Unit(call.path, "segment", macs, 0, False, reason, "a conv")
    return Candidate(unit, gate=call.path, nodes=frozenset(range(call.start, call.end)))


def _sizes(
    call: Call, graph: Graph, x: int, made: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return sizes in and out: as recorded, and of slightly larger inputs where the module takes them."""
    value = graph.values[x]
    found = [(value.shape[2:], made[2:])]
    own = next((p for p in call.module.parameters()), torch.empty(0))
    with evaluating(call.module), restored(call.module), torch.random.fork_rng(devices=[]):
        for more in (1, 2, 3):
            size = tuple(n + more for n in value.shape[2:])
            try:
                y = call.module(torch.zeros(1, value.shape[1], *size).to(own.device, value.dtype))
                found.append((size, tuple(y.shape[2:])))
            except Exception:  # it is made for one size
                break
    return found


def _fitting(
    seen: Window, kind: str, sizes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the kernel and the padding that give the same sizes, or None."""
    kernels, paddings = [], []
    for i, (stride, width) in enumerate(zip(seen.stride, seen.width, strict=True)):
        if kind == "pointwise" or width == 1:
            tried = [(1, 0)]
        else:
            odd = [(k, p) for k in (3, 5, 7) for p in (k // 2, 0, 1, 2) if p <= k // 2]
            tried = [*odd[:1], (2, 0), *odd[1:], (stride, 0), (4, 1), (2, 1), (4, 0)]
        for k, p in tried:
            if all(
                a[i] + 2 * p >= k and (a[i] + 2 * p - k) // stride + 1 == b[i] for a, b in sizes
            ):
                kernels.append(k)
                paddings.append(p)
                break
        else:
            return None
    if kind != "pointwise" and math.prod(kernels) == 1:
        return None  # the same as a pointwise one
    return tuple(kernels), tuple(paddings)


ACTIVATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "relu": ("ReLU", ()),
    "hardtanh": ("Hardtanh", ("min_val", "max_val")),
    "leaky_relu": ("LeakyReLU", ("negative_slope",)),
    "elu": ("ELU", ("alpha",)),
    "gelu": ("GELU", ()),
    "silu": ("SiLU", ()),
    "mish": ("Mish", ()),
    "hardswish": ("Hardswish", ()),
    "hardsigmoid": ("Hardsigmoid", ()),
    "sigmoid": ("Sigmoid", ()),
    "tanh": ("Tanh", ()),
}


def activation_of(graph: Graph, y: int, call: Call) -> tuple[tuple[str, Any], ...] | None:
    """Return the activation that a segment ends in, or None."""
    node = graph.producer(y)
    if node is None or not call.holds(node):
        return None
    op = node.op.removesuffix("_")
    if op not in ACTIVATIONS or len(dict.fromkeys(node.inputs)) != 1:
        return None
    name, names = ACTIVATIONS[op]
    given = [a for a in node.args[1:] if not isinstance(a, Ref)]
    if op == "elu" and any(a != 1 for a in given[1:]):
        return None
    args = dict(zip(names, given, strict=False))
    if op == "gelu" and node.kwargs:
        args["approximate"] = node.kwargs.get("approximate", "none")
    if name == "Hardtanh" and (args.get("min_val", -1), args.get("max_val", 1)) == (0, 6):
        name, args = "ReLU6", {}
    return (("type", name), *args.items())


def _gate(model: nn.Module, graph: Graph, call: Call, indexed: set[int]) -> Candidate | None:
    """Return a candidate where the module multiplies its input by numbers from a bounded range."""
    assert isinstance(call.output, Ref)
    node = graph.producer(call.output.value)
    if node is None or node.op not in ("mul", "mul_") or not call.holds(node):
        return None
    region = _region(graph, call)
    if region is None or isinstance(region, str):
        return None
    x, y, nodes = region
    if graph.values[x].shape != graph.values[y].shape or len(node.args) != 2:
        return None
    sides = [a.value for a in node.args if isinstance(a, Ref)]
    if len(sides) != 2 or x not in sides or sides[0] == sides[1]:
        return None
    g = sides[1] if sides[0] == x else sides[0]
    low, high = value_ranges(graph)[g]
    if graph.values[g].constant or low < 0 or math.isinf(high):
        return None
    if _usable(model, graph, call, indexed) is not None:
        return None
    macs = sum(n.macs for n in nodes)
    unit = Unit(call.path, "gate", macs, params_of(model, graph, nodes), True, None)
    return Candidate(unit, gate=call.path, value=x, nodes=frozenset(range(call.start, call.end)))


def with_shortcut(c: Candidate, chosen: Shortcut, residual: float | None) -> Candidate:
    """Return the segment with another of its options in its place."""
    assert c.shortcut is not None
    more = c.positions * (c.shortcut.macs_each - chosen.macs_each)
    params = c.unit.num_params + c.shortcut.num_params - chosen.num_params
    unit = replace(
        c.unit,
        macs=c.unit.macs + more,
        num_params=params,
        left=str(chosen),
        residual=residual,
    )
    return replace(c, unit=unit, shortcut=chosen)
