"""What a set of units costs together: nested units are counted once."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .gates import Gate, gates, is_leaf
from .trace import Graph, batch_size, record, unwrap
from .units import find_blocks, find_layers

__all__ = ["Ledger", "Saving", "ledger"]


@dataclass(frozen=True)
class Saving:
    """MACs (at batch size 1) and parameters that leave the net."""

    macs: int
    num_params: int


@dataclass(frozen=True)
class Ledger:
    """The costs of a converted model, by recorded operation and parameter."""

    macs: int
    num_params: int
    names: tuple[str, ...]
    batch: int
    nodes: dict[str, frozenset[int]]
    node_macs: dict[int, int]
    readers: dict[str, frozenset[int]]  # parameter -> operations that read it
    sizes: dict[str, int]

    def saving(self, remove: Iterable[str]) -> Saving:
        """Return what leaves with the named units."""
        dead: set[int] = set()
        for name in remove:
            dead |= self.nodes[name]
        macs = sum(self.node_macs.get(i, 0) for i in dead) // self.batch
        params = sum(self.sizes[p] for p, readers in self.readers.items() if readers <= dead)
        return Saving(macs, params)

    def own_macs(self, name: str) -> int:
        return sum(self.node_macs.get(i, 0) for i in self.nodes[name]) // self.batch

    def within(self, inner: str, outer: str) -> bool:
        """Whether one unit lies inside another."""
        return inner != outer and self.nodes[inner] <= self.nodes[outer]

    def empties(self, name: str, removed: Iterable[str]) -> bool:
        """Whether with this unit gone as well, an enclosing branch would have nothing to compute."""
        gone = set().union(self.nodes[name], *(self.nodes[r] for r in removed))
        for outer in self.names:
            if self.within(name, outer):
                left = self.nodes[outer] - gone
                if not any(self.node_macs.get(i, 0) for i in left):
                    return True
        return False


def ledger(model: nn.Module, example_inputs: Any) -> Ledger:
    """Return the costs of the units of a converted model.

    The parameters are those of the ordinary layers; the scalars of the gates are not counted.
    """
    model = unwrap(model)
    graph = record(model, example_inputs, leaf=is_leaf)
    every = gates(model)
    candidates = [*find_layers(model, graph), *find_blocks(model, graph)]
    nodes = {c.unit.name: c.nodes for c in candidates if c.unit.name in every}
    scalars = {
        id(p) for gate in every.values() for p in (gate.scale, gate.control) if p is not None
    }
    sizes = {n: p.numel() for n, p in model.named_parameters() if id(p) not in scalars}
    batch = batch_size(example_inputs)
    return Ledger(
        macs=sum(n.macs for n in graph.nodes) // batch,
        num_params=sum(sizes.values()),
        names=tuple(n for n in every if n in nodes),
        batch=batch,
        nodes=nodes,
        node_macs={n.index: n.macs for n in graph.nodes if n.macs},
        readers={k: frozenset(v) for k, v in _readers(model, graph).items() if k in sizes},
        sizes=sizes,
    )


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
