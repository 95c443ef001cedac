"""What a surgery has decided so far: values that stand for others, operations passed by."""

from dataclasses import dataclass, field

from torch import nn

from ..analysis.graph import Call, Graph
from ..nn.gates import BranchGate, Segment
from .concat import Slices
from .potentials import Potentials

__all__ = ["MustStayError", "Surgery", "original_path"]


@dataclass
class Surgery:
    graph: Graph
    fuse: bool = True  # whether the gates that stay become ordinary layers
    same_as: dict[int, int] = field(default_factory=dict)  # value -> value that takes its place
    bypassed: dict[int, int] = field(default_factory=dict)  # node -> position of what it passes on
    factors: dict[int, float] = field(default_factory=dict)  # passed-by node -> output over input
    optional: set[int] = field(default_factory=set)  # passed-by nodes that might as well stay
    multiply: dict[str, float] = field(default_factory=dict)  # gate path -> factor left over
    dead: set[int] = field(default_factory=set)
    indexed: set[int] = field(default_factory=set)  # ids of containers that code indexes
    # Segments whose shortcut is all that is left, by path, and those that keep both sides.
    replaced: list[str] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)  # values that no factor may enter
    slices: Slices | None = None
    potentials: Potentials = field(default_factory=Potentials)

    def resolve(self, value: int) -> int:
        while value in self.same_as:
            value = self.same_as[value]
        return value

    def is_dead(self, call: Call) -> bool:
        """Whether the call runs operations, and all of them for what is removed alone."""
        own = [i for i in range(call.start, call.end) if self.graph.nodes[i].op != "empty"]
        return bool(own) and all(i in self.dead for i in own)


class MustStayError(Exception):
    """An operation that was to be passed by has to stay: decide anew without it."""

    def __init__(self, nodes: set[int]) -> None:
        super().__init__(nodes)
        self.nodes = nodes


def original_path(model: nn.Module, path: str) -> str:
    """Return the path without the steps that gates added."""
    parts, kept, module = path.split(".") if path else [], [], model
    for part in parts:
        if not (isinstance(module, BranchGate | Segment) and part == "module"):
            kept.append(part)
        module = getattr(module, part)
    return ".".join(kept)
