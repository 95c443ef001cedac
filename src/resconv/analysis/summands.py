"""Sums in which one side can go, found in a record: ``a + s * b`` leaves ``a``.

What leaves is all that only ``b`` needs: the operations behind it whose every reader lies among them. A
residual block is the case in which ``a`` is what the branch reads (branches.py). Where both sides
compute something, both are candidates, and only one of them can go.
"""

from dataclasses import replace

from torch import nn

from .branches import find_gate, holds_branch_gate, params_of, why_not_left
from .candidates import Candidate, Unit
from .graph import Graph, Node, Ref

__all__ = ["behind", "find_summands"]

_ADDS = ("add", "add_", "sub", "sub_")


def find_summands(model: nn.Module, graph: Graph, blocks: list[Candidate]) -> list[Candidate]:
    """Return a candidate for each side of every sum that is none of the removable ``blocks``."""
    taken = {c.add for c in blocks if c.unit.removable}
    found = []
    for node in graph.nodes:
        if node.op not in _ADDS or node.index in taken or len(node.args) < 2:
            continue
        if not all(isinstance(a, Ref) for a in node.args[:2]):
            continue
        for left, side in ((0, 1), (1, 0)):
            candidate = _side(model, graph, node, node.args[left].value, node.args[side].value)
            if candidate is not None:
                found.append(candidate)
    return _with_names(found, graph, {c.unit.name for c in blocks})


def behind(graph: Graph, value: int, reader: Node) -> frozenset[int]:
    """Return the operations that only ``reader`` needs, and it only for this value."""
    last = graph.producer(value)
    if last is None or value in graph.outputs:
        return frozenset()
    closure: set[int] = set()
    waiting = {last.index}
    while waiting:
        # The latest first: by then all of its readers have been looked at.
        index = max(waiting)
        waiting.remove(index)
        node = graph.nodes[index]
        if all(_stays_inside(graph, v, closure, reader, value) for v in node.outputs):
            closure.add(index)
            waiting |= {
                p.index
                for v in node.inputs
                if not graph.values[v].constant and (p := graph.producer(v)) is not None
            }
    return frozenset(closure)


def _stays_inside(graph: Graph, made: int, closure: set[int], reader: Node, read: int) -> bool:
    if made in graph.outputs:
        return False
    users = graph.users.get(made, [])
    return all(u.index in closure or (u is reader and made == read) for u in users)


def _side(model: nn.Module, graph: Graph, add: Node, left: int, side: int) -> Candidate | None:
    a, b = graph.values[left], graph.values[side]
    made = graph.values[add.outputs[0]]
    if left == side or a.constant or b.constant:
        return None
    if a.shape != made.shape or a.dtype != made.dtype:
        return None
    nodes = behind(graph, side, add)
    macs = sum(graph.nodes[i].macs for i in nodes)
    if not macs:
        return None
    region = [graph.nodes[i] for i in sorted(nodes)]
    num_params = params_of(model, graph, region)
    reason = why_not_left(add, left)
    gate = "" if reason else find_gate(model, graph, side, set(nodes), add)
    if reason is None and not gate:
        reason = "no module at the summand's end whose output can be scaled"
    unit = Unit(
        add.call.path, "summand", macs, num_params, reason is None, reason, "the rest of the sum"
    )
    return Candidate(unit, gate=gate, add=add.index, value=left, nodes=nodes)


def _with_names(found: list[Candidate], graph: Graph, taken: set[str]) -> list[Candidate]:
    """Name a summand by the module that adds, and the module in which it ends."""
    taken = set(taken)
    for c in found:
        known = holds_branch_gate(graph, c.gate)
        if known is not None:
            c.unit = replace(c.unit, name=known)
            continue
        owner = c.unit.name
        end = c.gate.removeprefix(owner + ".") if c.gate else f"add{c.add}"
        name = f"{owner or 'root'}/{end}"
        c.take_name(name, taken)
    return found
