"""What a set of units costs together: nested units are counted once.

The recorded operations are sorted into atoms, sets of operations that only ever leave together: two
operations are in one atom when the same units hold both. Adding up atoms, and not operations,
makes asking for a saving cheap enough to try every unit at every step of a plan.

A segment leaves layers in its place. They are no part of the whole net, and count where the segment is
gone and nothing around it is, or where its scale is neither 0 nor 1: then both are there. Of two
units that exclude each other (the sides of a sum) one is counted: ``compatible`` says which of some
units can go together.

Latency is not a sum over operations, since a runtime fuses them. It is measured by unit (see
latency.py): each unit has the milliseconds that leave with it beyond those of the units inside it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from ..analysis.candidates import Candidate, compatible, conflicts
from ..analysis.finding import find_units
from ..analysis.graph import Graph, Node, Ref
from ..analysis.inputs import batch_size, unwrap
from ..analysis.recorder import record
from ..nn.gates import Gate, ResConv, Segment, gates, is_leaf
from .budget import Limits

__all__ = ["Cost", "CostModel", "cost_model", "excess"]


class Cost(NamedTuple):
    """What leaves the net: MACs (at batch size 1), parameters, and predicted milliseconds."""

    macs: int
    num_params: int
    latency_ms: float = 0.0


@dataclass(frozen=True)
class CostModel:
    """The costs of a converted model.

    ``latency_ms`` (infinite while nothing was measured) and ``unit_ms`` come from a latency table.
    """

    macs: int
    num_params: int
    names: tuple[str, ...]
    atoms: dict[str, frozenset[int]]  # unit -> what leaves with it
    atom_macs: tuple[int, ...]
    atom_params: tuple[int, ...]  # of parameters that operations of this atom alone read
    shared_params: tuple[tuple[frozenset[int], int], ...]  # read by several atoms
    kinds: dict[str, str]  # what each unit computes: units of the same shapes have the same
    signatures: dict[str, str]  # the kind and the readers: the same text costs the same time
    inner: dict[str, frozenset[str]] = field(default_factory=dict)  # unit -> units inside it
    comes: dict[str, tuple[int, int]] = field(default_factory=dict)  # MACs, parameters in its place
    blended: frozenset[str] = frozenset()  # segments that leave both sides where they stay
    excluded: dict[str, frozenset[str]] = field(default_factory=dict)  # what cannot go with a unit
    latency_ms: float = 0.0
    unit_ms: dict[str, float] = field(default_factory=dict)

    @property
    def whole(self) -> Cost:
        """Return the costs of the net with all its units."""
        return Cost(self.macs, self.num_params, self.latency_ms)

    def cost_of(self, remove: Iterable[str]) -> Cost:
        """Return what leaves with the named units, less what comes in their place."""
        remove = tuple(remove)
        dead: set[int] = set()
        inside: set[str] = set()
        for name in remove:
            dead |= self.atoms[name]
            inside |= self.inner[name]
        gone = inside.union(remove)
        macs = sum(self.atom_macs[a] for a in dead)
        num_params = sum(self.atom_params[a] for a in dead)
        num_params += sum(size for readers, size in self.shared_params if readers <= dead)
        for name in (*dict.fromkeys(remove), *sorted(self.blended - gone)):
            if name in self.comes and name not in inside:
                macs -= self.comes[name][0]
                num_params -= self.comes[name][1]
        # In one order, or rounding would tell sets apart that are the same.
        ms = sum(self.unit_ms[n] for n in self.names if n in gone) if self.unit_ms else 0.0
        return Cost(macs, num_params, ms)

    def left(self, remove: Iterable[str]) -> Cost:
        """Return the costs of the net without the named units."""
        saved = self.cost_of(remove)
        return Cost(
            self.macs - saved.macs,
            self.num_params - saved.num_params,
            self.latency_ms - saved.latency_ms,
        )

    def gone(self, remove: Iterable[str]) -> frozenset[str]:
        """Return the named units and all units inside them."""
        return frozenset().union(*({n} | self.inner[n] for n in remove))

    def excludes(self, name: str, removed: Iterable[str]) -> bool:
        """Whether a unit cannot go because of those that do."""
        others = self.excluded.get(name)
        return others is not None and not others.isdisjoint(removed)

    def compatible(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of the names that can go together, of each sum the side that saves more."""
        names = tuple(names)
        if not self.excluded:
            return names
        ranked = sorted(names, key=lambda n: -self.own_macs(n))
        kept = set(compatible(ranked, self.excluded))
        return tuple(n for n in names if n in kept)

    def own_macs(self, name: str) -> int:
        return self.cost_of([name]).macs

    def own_ms(self, name: str) -> float:
        return self.cost_of([name]).latency_ms

    def within(self, inner: str, outer: str) -> bool:
        """Whether one unit lies inside another."""
        return inner in self.inner[outer]

    def empties(self, name: str, removed: Iterable[str]) -> bool:
        """Whether with this unit gone as well, an enclosing branch would have nothing to compute."""
        gone = self.atoms[name].union(*(self.atoms[r] for r in removed))
        return any(
            name in self.inner[outer]
            and not any(self.atom_macs[a] for a in self.atoms[outer] if a not in gone)
            for outer in self.names
        )

    def with_latency(self, latency_ms: float, unit_ms: Mapping[str, float]) -> "CostModel":
        """Return the same costs with measured milliseconds."""
        return replace(
            self, latency_ms=latency_ms, unit_ms={n: unit_ms.get(n, 0.0) for n in self.names}
        )


def excess(left: Cost, whole: Cost, limits: Limits) -> str:
    """Say by how much a net is over its limits; empty when it is within all of them."""
    parts = []
    for value, of, limit, what in zip(
        left[:2], whole[:2], limits, ("MACs", "parameters"), strict=False
    ):
        if value > limit:
            parts.append(f"{value:,} of {of:,} {what} (the budget is {int(limit):,})")
    if left.latency_ms > limits.latency_ms:
        parts.append(
            f"about {left.latency_ms:.3g} of {whole.latency_ms:.3g} ms (the budget is "
            f"{limits.latency_ms:.3g} ms)"
        )
    return " and ".join(parts)


def cost_model(model: nn.Module, example_inputs: Any) -> CostModel:
    """Return the costs of the units of a converted model.

    The parameters are those of the ordinary layers; the scalars of the gates are not counted.
    """
    model = unwrap(model)
    graph = record(model, example_inputs, leaf=is_leaf)
    every = gates(model)
    found = {c.unit.name: c for c in find_units(model, graph) if c.unit.name in every}
    names = tuple(n for n in every if n in found)
    # What would come in the place of segments is no part of the net as it is.
    coming = frozenset().union(*(c.left_nodes for c in found.values()))
    held: dict[int, list[str]] = {}
    for name in names:
        for index in found[name].nodes - coming:
            held.setdefault(index, []).append(name)
    numbers: dict[tuple[str, ...], int] = {}
    atom_of = {i: numbers.setdefault(tuple(h), len(numbers)) for i, h in sorted(held.items())}
    batch = batch_size(example_inputs)
    atom_macs = [0] * len(numbers)
    for index, atom in atom_of.items():
        atom_macs[atom] += graph.nodes[index].macs
    scalars = {
        id(p)
        for gate in gates(model, fixed=True).values()
        for p in (gate.scale, gate.control)
        if p is not None
    }
    coming_params = {
        id(p): p.numel()
        for gate in every.values()
        if isinstance(gate, Segment)
        for p in gate.left.parameters()
    }
    sizes = {
        n: p.numel()
        for n, p in model.named_parameters()
        if id(p) not in scalars and id(p) not in coming_params
    }
    atom_params = [0] * len(numbers)
    shared: dict[frozenset[int], int] = {}
    for param, readers in _readers(model, graph).items():
        # A parameter leaves when everything that reads it does.
        if param not in sizes or not all(i in atom_of for i in readers):
            continue
        atoms = frozenset(atom_of[i] for i in readers)
        if len(atoms) == 1:
            atom_params[min(atoms)] += sizes[param]
        else:
            shared[atoms] = shared.get(atoms, 0) + sizes[param]
    kinds = {n: _kind(graph, found[n]) for n in names}
    return CostModel(
        macs=sum(n.macs for n in graph.nodes if n.index not in coming) // batch,
        num_params=sum(sizes.values()),
        names=names,
        atoms={n: frozenset(atom_of[i] for i in found[n].nodes - coming) for n in names},
        atom_macs=tuple(m // batch for m in atom_macs),
        atom_params=tuple(atom_params),
        shared_params=tuple(shared.items()),
        kinds=kinds,
        signatures={n: f"{kinds[n]} -> {_readers_of(graph, found[n])}" for n in names},
        inner={
            n: frozenset(m for m in names if m != n and found[m].nodes <= found[n].nodes)
            for n in names
        },
        comes={
            n: (sum(graph.nodes[i].macs for i in found[n].left_nodes) // batch, _fused_size(gate))
            for n in names
            if isinstance(gate := every[n], Segment) and gate.kind == "segment"
        },
        blended=frozenset(
            n
            for n in names
            if isinstance(gate := every[n], Segment)
            and gate.kind == "segment"
            and gate.scale.item() not in (0, 1)
        ),
        excluded=conflicts(found[n] for n in names),
    )


def _fused_size(gate: Segment) -> int:
    """Return the parameters of what is left of a segment, its norm in the conv before it."""
    convs = [m for m in gate.left.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return sum(c.weight.numel() for c in convs) + convs[-1].out_channels


def _kind(graph: Graph, candidate: Candidate) -> str:
    """Describe what a unit computes, on which shapes."""
    nodes = sorted(candidate.nodes | candidate.left_nodes)
    parts = [_describe(graph, graph.nodes[i]) for i in nodes]
    return f"{candidate.unit.kind}: {'; '.join(parts)}"


def _readers_of(graph: Graph, candidate: Candidate) -> str:
    """Describe what reads a unit."""
    outside = [
        user
        for i in sorted(candidate.nodes)
        for value in graph.nodes[i].outputs
        for user in graph.users.get(value, [])
        if user.index not in candidate.nodes
    ]
    return ", ".join(sorted({op for user in outside for op in _ops(graph, user)}))


def _ops(graph: Graph, node: Node) -> list[str]:
    """Return what this reader does; a branch's gate does nothing in the net that is deployed."""
    if node.op != "gate" or isinstance(node.call.module, ResConv):
        return [node.op]
    return [op for v in node.outputs for u in graph.users.get(v, []) for op in _ops(graph, u)]


def _describe(graph: Graph, node: Node) -> str:
    shapes = [graph.values[v].shape for v in (*node.inputs, *node.outputs)]
    module = node.call.module
    what = f"{module.conv}, {module.norm}" if isinstance(module, ResConv) else ""
    plain = [a for a in node.args if not isinstance(a, Ref)]
    return f"{node.op} {what}{plain} {shapes}"


def _readers(model: nn.Module, graph: Graph) -> dict[str, set[int]]:
    name_of = {id(p): n for n, p in model.named_parameters()}
    readers: dict[str, set[int]] = {}
    behind: dict[int, set[str]] = {}
    for value in graph.values:
        if value.param is not None:
            behind[value.index] = {value.param}
    for node in graph.nodes:
        names = set().union(*(behind.get(v, set()) for v in node.inputs)) if node.inputs else set()
        constant = all(graph.values[v].constant for v in node.outputs)
        if constant:
            for v in node.outputs:
                behind[v] = names
            continue
        if node.op == "gate":
            module: nn.Module = node.call.module
            if isinstance(module, Gate):
                names |= {name_of[id(p)] for p in module.parameters()}
        for name in names:
            readers.setdefault(name, set()).add(node.index)
    return readers
