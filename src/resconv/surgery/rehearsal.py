"""The whole removal, carried out before anything is trained, and its result run and compared.

What ``trial`` works out on a record alone is cheap, and finds nearly all that ``prune`` would refuse.
This finds the rest: a net that does not run without a unit, or computes something else than the
record shows.
"""

from collections.abc import Sequence

from torch import nn

from ..analysis.candidates import Candidate, compatible, conflicts
from ..analysis.graph import Graph
from ..errors import ResConvError
from ..nn.gates import gates
from .pruning import operate
from .trial import first_refused, generic

__all__ = ["why_prune_fails"]


def why_prune_fails(gated: nn.Module, chosen: list[Candidate], graph: Graph) -> dict[str, str]:
    """Return which of the chosen units ``prune`` would refuse, with the reasons.

    ``graph`` is a record of ``gated``; what was found out about it holds here, too. Every second
    branch goes, and all layers that lie in none of these. ``gated`` is left as it was.
    """
    excluded = conflicts(chosen)
    halves = set(compatible([c.unit.name for c in chosen if c.gate][::2], excluded))
    # All segments: what comes in their place has to fit.
    every = compatible(
        [c.unit.name for c in chosen if c.shortcut is not None or c.unit.name in halves], excluded
    )
    branches = [c for c in chosen if c.gate and c.unit.name in every]
    inside = frozenset().union(*(c.nodes for c in branches))
    layers = [c for c in chosen if c.unit.removable and not c.gate and not c.nodes & inside]
    going = {c.unit.name for c in (*branches, *layers)}
    names = [n for n in gates(gated) if n in going]
    controls = [g.control for g in gates(gated).values() if g.control is not None]
    refused: dict[str, str] = {}

    def attempt(names: Sequence[str]) -> str | None:
        if not names:
            return None
        with generic(controls):
            try:
                operate(gated, tuple(names), fuse=True, matched=graph.matched)
            except ResConvError as error:
                return str(error).rstrip(".")
            except Exception as error:
                # Whatever it is, it would meet prune as well, after the training.
                return f"removing it fails ({type(error).__name__}: {error})"
        return None

    good = 0
    while (reason := attempt(names)) is not None:
        count, reason = first_refused(names, attempt, reason, good)
        refused[names.pop(count - 1)] = reason
        good = count - 1
    return refused
