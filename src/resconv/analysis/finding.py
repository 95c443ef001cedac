"""Every unit of a recorded model, of the kinds that are asked for or that it has gates of."""

from collections.abc import Iterable, Sequence

from torch import nn

from ..nn.gates import FactorGate, Gate
from ..nn.shortcuts import SHORTCUT_KINDS
from .branches import find_blocks
from .candidates import KINDS, Candidate
from .factors import find_factors
from .graph import Graph
from .layers import find_layers
from .segments import find_segments, gated_segments
from .summands import find_summands

__all__ = ["find_branches", "find_units"]


def find_branches(model: nn.Module, graph: Graph) -> list[Candidate]:
    """Return the residual branches and summands of a recorded model, whose ends carry the scale.

    Of a converted model also the factors of products that have a gate.
    """
    blocks = find_blocks(model, graph)
    found = [*blocks, *find_summands(model, graph, blocks)]
    if any(isinstance(c.module, FactorGate) for c in graph.calls):
        found += find_factors(model, graph)
    return found


def find_units(
    model: nn.Module,
    graph: Graph,
    kinds: Iterable[str] = KINDS,
    indexed: set[int] | None = None,
    shortcuts: Sequence[str] = SHORTCUT_KINDS,
) -> list[Candidate]:
    """Return a candidate for every unit of these kinds.

    Segments and gates of a model that is converted already are those it has.
    """
    kinds = set(kinds)
    found: list[Candidate] = []
    if "layer" in kinds:
        found += find_layers(model, graph)
    if kinds & {"block", "summand", "gate"}:
        branches = find_branches(model, graph)
        found += [c for c in branches if c.unit.kind in kinds]
    if any(isinstance(c.module, Gate) for c in graph.calls):
        found += [c for c in gated_segments(graph) if c.unit.kind in kinds]
        return found
    if asked := kinds & {"segment", "gate"}:
        found += find_segments(
            model, graph, found, indexed or set(), kinds=asked, shortcuts=shortcuts
        )
    if "gate" in kinds:
        held = frozenset().union(*(c.nodes for c in found if c.unit.kind == "gate"))
        found += find_factors(model, graph, held)
    return found
