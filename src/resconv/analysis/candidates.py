"""A unit, and what stands in the way of replacing a module: what layers.py and branches.py share."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..nn.geometry import Reach
from ..tables import html_table, text_table
from .graph import Graph

__all__ = [
    "Candidate",
    "Unit",
    "Units",
    "owner_of",
    "params_behind",
    "why_untouchable",
]


@dataclass(frozen=True)
class Unit:
    """A conv layer or a residual branch.

    ``macs`` (at batch size 1) and ``num_params`` are what leaves with it. ``reason`` says why it
    stays, and is None for a removable unit.
    """

    name: str
    kind: str
    macs: int
    num_params: int
    removable: bool
    reason: str | None = None


class Units(list[Unit]):
    """The units of a model, a list; it prints as a table."""

    def __repr__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[object]]]:
        """Return title, header and rows of what a reader wants to know."""
        free = sum(u.removable for u in self)
        rows: list[list[object]] = [
            [u.name, u.kind, u.macs, u.num_params, "can go" if u.removable else u.reason or "stays"]
            for u in self
        ]
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
