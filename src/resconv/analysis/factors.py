"""Products in which one factor can go, found in a record: ``z = x * (1 + s * (g - 1))`` leaves ``x``.

``g`` is what a module returns that computes numbers of bounded range (an attention module called inside
another's forward). A module that multiplies its input itself is a gate as a whole: see segments.py.
"""

import math

from torch import nn

from ..nn.gates import FactorGate
from .branches import holds_branch_gate, params_of
from .candidates import Candidate, Unit, why_untouchable
from .graph import Graph, Node, Ref
from .ops import bounds
from .summands import behind

__all__ = ["find_factors", "value_ranges"]

_MOVES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "unsqueeze", "squeeze"}


def find_factors(
    model: nn.Module, graph: Graph, held: frozenset[int] = frozenset()
) -> list[Candidate]:
    """Return a candidate for every product with a factor that can go; ``held`` are others' operations.

    Of a model that is converted already, those that have their gate.
    """
    found = []
    gated = any(isinstance(c.module, FactorGate) for c in graph.calls)
    for node in graph.nodes:
        if node.op not in ("mul", "mul_") or len(node.args) != 2 or node.index in held:
            continue
        if not all(isinstance(a, Ref) for a in node.args):
            continue
        for left, side in ((0, 1), (1, 0)):
            x, g = node.args[left].value, node.args[side].value
            candidate = _factor(model, graph, node, x, g, gated)
            if candidate is not None:
                found.append(candidate)
                break
    return found


def value_ranges(graph: Graph) -> list[tuple[float, float]]:
    """Return the least and greatest value that each recorded value can have."""
    key = ("bounds", "")
    if key not in graph.known:
        known = [(-math.inf, math.inf)] * len(graph.values)
        for node in graph.nodes:
            span = bounds(graph, node, known)
            for value in node.outputs:
                known[value] = span
        graph.known[key] = known
    found: list[tuple[float, float]] = graph.known[key]
    return found


def _factor(
    model: nn.Module, graph: Graph, product: Node, x: int, g: int, gated: bool
) -> Candidate | None:
    values = graph.values
    if x == g or values[x].constant or values[g].constant:
        return None
    made = values[product.outputs[0]]
    if values[x].shape != made.shape or values[x].dtype != made.dtype:
        return None
    low, high = value_ranges(graph)[g]
    if not gated and (low < 0 or math.isinf(high)):
        return None
    nodes = behind(graph, g, product)
    path = _module_that_returns(model, graph, g, nodes, product, gated)
    if not path:
        return None
    region = [graph.nodes[i] for i in sorted(nodes)]
    name = holds_branch_gate(graph, path) or path
    macs = sum(n.macs for n in region)
    unit = Unit(name, "gate", macs, params_of(model, graph, region), True)
    return Candidate(unit, gate=path, add=product.index, value=x, nodes=nodes)


def _module_that_returns(
    model: nn.Module, graph: Graph, value: int, nodes: frozenset[int], product: Node, gated: bool
) -> str:
    """Return the path of the outermost module that returns the factor, whatever its shape; or ""."""
    while True:
        for call in graph.calls_to(value):
            if call.holds(product) or not call.path:
                continue
            if gated:
                if isinstance(call.module, FactorGate):
                    return call.path
                continue
            inside = range(call.start, call.end)
            own = [
                i
                for i in inside
                if any(not graph.values[v].constant for v in graph.nodes[i].outputs)
            ]
            if own and nodes.issuperset(own) and why_untouchable(model, graph, call.path) is None:
                return call.path
        node = graph.producer(value)
        if node is None or node.index not in nodes or node.op not in _MOVES:
            return ""
        data = [v for v in node.inputs if not graph.values[v].constant]
        if len(data) != 1:
            return ""
        value = data[0]
