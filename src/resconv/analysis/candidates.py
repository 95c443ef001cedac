"""A unit, and what stands in the way of replacing a module: what layers.py and branches.py share."""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..nn.geometry import Reach
from ..nn.shortcuts import Shortcut
from ..tables import html_table, text_table
from .graph import Graph

__all__ = [
    "DEFAULT_KINDS",
    "KINDS",
    "Candidate",
    "Unit",
    "Units",
    "compatible",
    "conflicts",
    "owner_of",
    "params_behind",
    "why_untouchable",
]


KINDS = ("layer", "block", "summand", "segment", "gate")
DEFAULT_KINDS = ("layer", "block")


@dataclass(frozen=True)
class Unit:
    """A part of a net that can go: a conv layer, a residual branch, a summand, a segment or a gate.

    ``macs`` (at batch size 1) and ``num_params`` are what leaves with it, less what comes in its
    place. ``reason`` says why it stays, and is None for a removable unit. ``left`` says what is
    left in its place, and ``residual`` how much of the unit's variance that does not explain,
    where it was fitted.
    """

    name: str
    kind: str
    macs: int
    num_params: int
    removable: bool
    reason: str | None = None
    left: str = "its input"
    residual: float | None = None

    @property
    def fate(self) -> str:
        """Return whether the unit can go, what is then left of it, or why it stays."""
        if not self.removable:
            return self.reason or "stays"
        fit = "" if self.residual is None else f" ({self.residual:.0%} unexplained)"
        return "can go" if self.left == "its input" else f"can go: leaves {self.left}{fit}"


class Units(list[Unit]):
    """The units of a model, a list; it prints as a table."""

    def __repr__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[object]]]:
        """Return title, header and rows of what a reader wants to know."""
        free = sum(u.removable for u in self)
        rows: list[list[object]] = [[u.name, u.kind, u.macs, u.num_params, u.fate] for u in self]
        title = f"{len(self)} units, {free} of them removable"
        return title, ["unit", "kind", "MACs", "parameters", "removable, or why not"], rows


@dataclass
class Candidate:
    """A unit with what the surgery needs to know about it."""

    unit: Unit
    conv: str = ""
    norm: str | None = None
    norm_children: tuple[str, ...] = ()
    reach: Reach | None = None  # of a conv that stays, but may have a shortcut while training
    gate: str = ""
    add: int = -1
    value: int = -1
    nodes: frozenset[int] = field(default_factory=frozenset)
    shortcut: Shortcut | None = None  # what is left of a segment; None of a gate
    options: tuple[Shortcut, ...] = ()  # what else might be left, this one among them
    positions: int = 0  # of its output, in the whole recorded batch
    start: dict[str, Tensor] = field(default_factory=dict)  # fitted numbers of the shortcut
    left_nodes: frozenset[int] = field(default_factory=frozenset)  # recorded operations of it

    def take_name(self, name: str, taken: set[str]) -> None:
        """Give the unit this name, or where that is taken the next one like it."""
        while name in taken:
            name += "'"
        taken.add(name)
        self.unit = replace(self.unit, name=name)


def conflicts(candidates: Iterable[Candidate]) -> dict[str, frozenset[str]]:
    """Return, for each unit that cannot go together with some others, their names.

    Of a sum one side has to stay. Units that hold operations in common, and neither the other's, cannot
    both be taken out either.
    """
    every = list(candidates)
    found: dict[str, set[str]] = {}
    for i, c in enumerate(every):
        for other in every[:i]:
            both_sides = c.add >= 0 and c.add == other.add and c.gate != other.gate
            new = {c.unit.kind, other.unit.kind} - set(DEFAULT_KINDS)
            common = c.nodes & other.nodes if new else frozenset()
            crossing = bool(common) and not (c.nodes <= other.nodes or other.nodes <= c.nodes)
            if both_sides or crossing:
                found.setdefault(c.unit.name, set()).add(other.unit.name)
                found.setdefault(other.unit.name, set()).add(c.unit.name)
    return {n: frozenset(others) for n, others in found.items()}


def compatible(names: Iterable[str], excluded: Mapping[str, Set[str]]) -> tuple[str, ...]:
    """Return those of the names that can go together, the first of each sum."""
    kept: list[str] = []
    for name in names:
        if not any(other in kept for other in excluded.get(name, ())):
            kept.append(name)
    return tuple(kept)


def owner_of(param: str) -> str:
    return param.rpartition(".")[0]


def why_untouchable(model: nn.Module, graph: Graph, path: str) -> str | None:
    """Return why the module at ``path`` cannot be replaced by another, or None."""
    module = model.get_submodule(path)
    calls = graph.calls_of(path)
    if not calls:
        return f"{path} is never called as a module (its parameters are used by other code)"
    if len(calls) > 1:
        return f"{path} is called {len(calls)} times in one forward pass"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return f"{path} carries a hook, which would be lost"
    for name, _ in module.named_parameters(path, recurse=False):
        if name in graph.written:
            return f"the forward writes into {name}"
    parametrized = getattr(module, "parametrizations", None)
    if isinstance(parametrized, nn.ModuleDict):
        return f"{path} is parametrised ({', '.join(parametrized)})"
    return None


def params_behind(graph: Graph, value: int) -> Iterator[str]:
    if graph.values[value].param is not None:
        yield graph.values[value].param  # type: ignore[misc]
    elif graph.values[value].constant and (node := graph.producer(value)) is not None:
        for v in node.inputs:
            yield from params_behind(graph, v)
