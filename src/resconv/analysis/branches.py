"""Residual branches, found in a record: additions ``v + F(v)``, ``v + a F(v)`` and ``v - a F(v)``.

Everything between ``v`` and the addition depends on ``v`` alone and is read by nobody else, so without it
the addition is the identity. Nothing here looks at the class of a block.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from ..nn.gates import BranchGate, FactorGate, ResConv, is_plain_norm
from .candidates import Candidate, Unit, params_behind, why_untouchable
from .graph import Call, Graph, Node, Ref
from .ops import is_identity, kind

__all__ = [
    "branch_region",
    "find_blocks",
    "find_gate",
    "holds_branch_gate",
    "params_of",
    "source",
    "why_not_left",
]


def find_blocks(model: nn.Module, graph: Graph) -> list[Candidate]:
    """Return a candidate for every residual addition of the recorded model."""
    found = []
    for node in graph.nodes:
        if node.op not in ("add", "add_", "sub", "sub_") or len(node.args) < 2:
            continue
        if not all(isinstance(a, Ref) for a in node.args[:2]):
            continue
        for short, branch in ((0, 1), (1, 0)):
            v, w = node.args[short].value, node.args[branch].value
            region = branch_region(graph, v, w)
            if region is not None:
                found.append(_block(model, graph, node, v, w, region))
                break
    return _with_names(found, graph)


def source(graph: Graph, value: int) -> int:
    """Follow copies back to the value they copy."""
    while (node := graph.producer(value)) is not None and is_identity(node):
        value = node.inputs[0]
    return value


def branch_region(graph: Graph, v: int, w: int) -> list[Node] | None:
    """Return the nodes between ``v`` and ``w`` when ``w`` is computed from ``v`` alone."""
    v = source(graph, v)
    if graph.values[v].constant or graph.values[v].shape != graph.values[w].shape:
        return None
    first = graph.values[v].producer
    first = -1 if first is None else first
    nodes: dict[int, Node] = {}
    reached, stack = False, [w]
    while stack:
        value = stack.pop()
        if value == v:
            reached = True
            continue
        if graph.values[value].constant:
            continue
        node = graph.producer(value)
        if node is None or node.index <= first:
            return None
        if node.index not in nodes:
            nodes[node.index] = node
            stack.extend(node.inputs)
    return [nodes[i] for i in sorted(nodes)] if reached and nodes else None


def _block(
    model: nn.Module,
    graph: Graph,
    add: Node,
    v: int,
    w: int,
    region: list[Node],
) -> Candidate:
    inside = {n.index for n in region}
    macs = sum(n.macs for n in region)
    num_params = params_of(model, graph, region)
    reason = why_not_left(add, v)
    for n in region if reason is None else ():
        for value in n.outputs:
            outside = [u for u in graph.users.get(value, []) if u.index not in inside]
            outside = [u for u in outside if u is not add or value != w]
            if outside or value in graph.outputs:
                reason = (
                    f"an inner value of the branch ({n.op} in {n.call.path}) is used outside it"
                )
    gate = "" if reason else find_gate(model, graph, w, inside, add)
    if reason is None and not gate:
        reason = "no module at the branch's end whose output can be scaled"
    unit = Unit(add.call.path, "block", macs, num_params, reason is None, reason)
    return Candidate(unit, gate=gate, add=add.index, value=v, nodes=frozenset(inside))


def params_of(model: nn.Module, graph: Graph, region: list[Node]) -> int:
    """Return how many parameters these operations read."""
    params = {p for n in region for value in n.inputs for p in params_behind(graph, value)}
    params |= {
        f"{n.call.path}.{p}"
        for n in region
        if n.op == "gate"
        for p, _ in n.call.module.named_parameters()
    }
    key = ("sizes of parameters", "")
    if key not in graph.known:
        graph.known[key] = {name: p.numel() for name, p in model.named_parameters()}
    sizes: dict[str, int] = graph.known[key]
    return sum(sizes.get(p, 0) for p in params)


def holds_branch_gate(graph: Graph, path: str) -> str | None:
    """Return the name of the unit whose gate stands at ``path``, or None."""
    for call in graph.calls_of(path) if path else ():
        if isinstance(call.module, BranchGate) and call.module.unit:
            return call.module.unit
    return None


def why_not_left(add: Node, v: int) -> str | None:
    """Return why ``v`` is not what the addition comes to without its other summand, or None."""
    if add.args[0] == Ref(v):
        return None
    factor = add.kwargs.get("alpha", 1)
    factor = -factor if add.op.startswith("sub") else factor
    if factor == 1:
        return None
    return f"without the branch {factor:g} times its input would be left, not the input"


def find_gate(model: nn.Module, graph: Graph, w: int, inside: set[int], add: Node) -> str:
    """Return the path of the module nearest to the addition whose output carries the branch."""
    ancestors = set()
    call: Call | None = add.call
    while call is not None:
        ancestors.add(call.index)
        call = call.parent
    value = w
    while True:
        # A BatchNorm first: there the scale costs no pass over the activations.
        # The gate of an earlier conversion before anything else.
        for candidate in sorted(
            graph.calls_to(value),
            key=lambda c: (
                0 if isinstance(c.module, BranchGate) else 2 - is_plain_norm(c.module),
                -c.index,
            ),
        ):
            if candidate.index in ancestors:
                continue
            if candidate.start == candidate.end and graph.values[value].producer is None:
                continue
            if any(
                i not in inside
                for i in range(candidate.start, candidate.end)
                if graph.nodes[i].op != "empty" and not _constant(graph, graph.nodes[i])
            ):
                continue
            if isinstance(candidate.module, FactorGate):
                continue
            if isinstance(candidate.module, BranchGate):
                return candidate.path
            if any(
                isinstance(model.get_submodule(p), BranchGate) for p in _parents(candidate.path)
            ):
                continue
            if is_plain_norm(candidate.module) and _is_tied(model, candidate.module):
                continue  # a scale in its weight would scale the other norm as well
            if why_untouchable(model, graph, candidate.path) is None and not isinstance(
                candidate.module, ResConv
            ):
                return candidate.path
        node = graph.producer(value)
        if node is None or node.index not in inside:
            return ""
        if kind(graph, node) != "homogeneous":
            return ""
        data = [v for v in node.inputs if not graph.values[v].constant]
        if len(data) != 1 or any(u is not node for u in graph.users.get(data[0], [])):
            return ""
        value = data[0]


def _is_tied(model: nn.Module, module: nn.Module) -> bool:
    own = {id(p) for p in module.parameters(recurse=False)}
    holders = (m for m in model.modules() if m is not module)
    return any(id(p) in own for m in holders for p in m._parameters.values())


def _parents(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _constant(graph: Graph, node: Node) -> bool:
    return all(graph.values[v].constant for v in node.outputs)


def _with_names(found: list[Candidate], graph: Graph) -> list[Candidate]:
    """Name a block by the module that adds; with several additions there, by the branch as well."""
    seen: dict[str, int] = {}
    for c in found:
        seen[c.unit.name] = seen.get(c.unit.name, 0) + 1
    taken: set[str] = set()
    for c in found:
        owner = c.unit.name
        known = holds_branch_gate(graph, c.gate)
        if known is not None:
            c.unit = replace(c.unit, name=known)
            continue
        name = owner or "root"
        if seen[owner] > 1 or not owner:
            branch = c.gate.removeprefix(owner + ".") if c.gate else f"add{c.add}"
            name = f"{owner}/{branch}"
        c.take_name(name, taken)
    return found
