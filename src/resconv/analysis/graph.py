"""What a record of one forward pass consists of: values, the operations that made them, module calls.

In-place writes are turned into new values on the way, so a value never changes once it is made.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = [
    "Call",
    "Graph",
    "Node",
    "Ref",
    "Value",
    "data_of",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Ref:
    """A tensor's place in an argument list: the value it held."""

    value: int


@dataclass
class Value:
    """What one operation made. ``param`` is a parameter's or buffer's name, if it is one.

    Values of one ``memory`` share it: views of one tensor, and what writes in place made of it.
    """

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    producer: int | None = None
    param: str | None = None
    constant: bool = False  # computed from parameters alone
    memory: int = -1


@dataclass
class Call:
    """One call of one module, with the operations (nodes ``start:end``) it ran."""

    index: int
    path: str
    module: nn.Module
    parent: "Call | None"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: int
    end: int = -1
    output: Any = None

    def holds(self, node: "Node") -> bool:
        return self.start <= node.index < self.end


@dataclass
class Node:
    """One operation: ``op`` is the ATen name without its overload, or ``gate``.

    ``writes`` are those of the inputs whose memory the operation overwrites.
    """

    index: int
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    call: Call
    macs: int = 0
    tag: str | None = None
    writes: tuple[int, ...] = ()


@dataclass
class Graph:
    """The record of one forward pass. Modules are called by their first name in the model."""

    nodes: list[Node] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    output: Any = None
    # Values that code may read which did not run this time, since other values decide on it. They
    # are among the outputs, too.
    exposed: set[int] = field(default_factory=set)
    # Calls in which something asked for its mode: all others do the same in training mode, as long
    # as norms keep their statistics (see asking.py).
    asking: set[int] = field(default_factory=set)
    # Parameters that the forward itself writes: a factor in them would be gone with the next one.
    written: set[str] = field(default_factory=set)

    kinds: dict[int, str] = field(default_factory=dict)  # of nodes, where ops.py has looked
    # What was found out about modules as they were recorded, by what is asked and the path.
    known: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)
    # What rewritten forwards run, by their text and what was recorded: the same in another record.
    matched: dict[Any, list[Node]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._users: dict[int, list[Node]] | None = None
        self._calls_of: dict[str, list[Call]] | None = None
        self._calls_to: dict[int, list[Call]] | None = None
        self._places: dict[int, list[str]] | None = None
        self._tables: dict[Any, list[Any]] = {}

    def table(self, of: Callable[["Graph", Node], T]) -> list[T]:
        """Return what ``of`` says of each node of a finished record; it is asked once."""
        if of not in self._tables:
            self._tables[of] = [of(self, node) for node in self.nodes]
        return self._tables[of]

    @property
    def users(self) -> dict[int, list[Node]]:
        """Readers of each value."""
        if self._users is None:
            self._users = {}
            for node in self.nodes:
                for value in dict.fromkeys(node.inputs):
                    self._users.setdefault(value, []).append(node)
        return self._users

    def calls_of(self, path: str) -> list[Call]:
        if self._calls_of is None:
            self._calls_of = {}
            for call in self.calls:
                self._calls_of.setdefault(call.path, []).append(call)
        return self._calls_of.get(path, [])

    def calls_to(self, value: int) -> list[Call]:
        """Calls that return this value."""
        if self._calls_to is None:
            self._calls_to = {}
            for call in self.calls:
                if isinstance(call.output, Ref):
                    self._calls_to.setdefault(call.output.value, []).append(call)
        return self._calls_to.get(value, [])

    def places(self, model: nn.Module, module: nn.Module) -> list[str]:
        """Every path at which ``module`` stands in the recorded ``model``."""
        if self._places is None:
            self._places = {}
            for path, m in model.named_modules(remove_duplicate=False):
                self._places.setdefault(id(m), []).append(path)
        return self._places.get(id(module), [])

    def producer(self, value: int) -> Node | None:
        index = self.values[value].producer
        return None if index is None else self.nodes[index]


def data_of(graph: Graph, node: Node) -> list[int]:
    """Return the inputs of the node that depend on the net's input."""
    return [v for v in node.inputs if not graph.values[v].constant]
