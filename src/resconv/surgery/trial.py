"""What a surgery comes to, worked out on a record: ``prune`` carries it out, ``convert`` tries it.

A unit whose removal is refused must not be trained towards 0. So before anything is trained, each
unit is removed on the record alone, and then many together (two units in one forward can be in each
other's way). Nothing is copied or changed. The decisions depend on the controls' values, which
training will choose, so they are tried with several: below 1, at 1 and above.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from ..analysis.candidates import Candidate, compatible, conflicts
from ..analysis.finding import find_branches
from ..analysis.graph import Graph
from ..errors import ResConvError
from ..nn.gates import Gate, gates, kept
from .decisions import MustStayError, Surgery, original_path
from .edit_kinds import Bypass, Edit
from .factors import tie_factors
from .proof import values_in_training_code
from .removal import decide
from .rewriting import tree_edits

__all__ = ["FAITHFUL", "decisions", "first_refused", "generic", "unabsorbed", "why_refused"]


# What a removal makes redundant in eval mode may count in training mode (dropout in a branch, an
# auxiliary head). Where it does, sums stay that could go; at last all operations, and no factor
# enters what code can read that asks for the mode.
FAITHFUL: tuple[tuple[str, ...] | None, ...] = ((), ("add", "add_"), None)


def decisions(
    model: nn.Module,
    graph: Graph,
    remove: tuple[str, ...],
    *,
    fuse: bool,
    indexed: set[int],
    blocks: list[Candidate] | None = None,
    faithful: int = 0,
    idle: frozenset[str] = frozenset(),
) -> tuple[Surgery, list[Edit]]:
    """Return what becomes of every value once the units are gone, and the edits of the tree.

    ``faithful`` is an index into FAITHFUL; ``idle`` as for ``decide``.

    Raises:
        PruneError: a unit cannot go; the message says why.
    """
    ops = FAITHFUL[faithful]
    keep = frozenset(
        n.index for n in graph.nodes if n.op != "gate" and (ops is None or n.op in ops)
    )
    pinned = values_in_training_code(graph) if ops is None else set()
    while True:
        try:
            todo = decide(
                model,
                graph,
                remove,
                fuse=fuse,
                keep=keep,
                indexed=indexed,
                blocks=blocks,
                idle=idle,
            )
            todo.pinned = pinned
            tie_factors(todo, fuse)
            return todo, tree_edits(model, todo)
        except MustStayError as again:
            keep |= again.nodes  # grows each time: what is kept is not passed by again


def why_refused(model: nn.Module, graph: Graph, indexed: set[int]) -> dict[str, str]:
    """Return which units of a gated model cannot be removed, with the reasons.

    ``graph`` is a record of the model with its gates as nodes. All that are not named can go, alone
    and together.
    """
    every = tuple(gates(model))
    controls = [g.control for g in gates(model).values() if g.control is not None]
    blocks = find_branches(model, graph)
    refused: dict[str, str] = {}

    def attempt(names: Iterable[str], low: float, high: float, fuse: bool = True) -> str | None:
        names = tuple(n for n in names if n not in refused)
        with generic(controls, low, high):
            return _why_not(model, graph, names, fuse, indexed, blocks) if names else None

    trials: list[tuple[tuple[str, ...], float, float, bool]] = []
    for name in every:
        if (reason := attempt([name], 0.5, 1.0)) is not None:
            refused[name] = reason
    excluded = conflicts(c for c in blocks if c.unit.name in every)
    if excluded:
        # Of a sum one side goes, or the other.
        trials = [(compatible(every[::-1], excluded), 0.5, 1.0, True)]
        every = compatible(every, excluded)
    trials += [(every, low, high, True) for low, high in ((0.5, 1.0), (1.0, 1.0), (1.0, 2.0))]
    trials += [(names, 0.5, 1.0, False) for names in (every, every[::2], every[1::2])]
    for names, low, high, fuse in trials:
        good = 0
        while (reason := attempt(names, low, high, fuse)) is not None:
            free = [n for n in names if n not in refused]
            alike = partial(attempt, low=low, high=high, fuse=fuse)
            count, reason = first_refused(free, alike, reason, good)
            refused[free[count - 1]] = f"it cannot go together with other units: {reason}"
            good = count - 1
    return refused


def first_refused(
    names: Sequence[str], attempt: Callable[[Sequence[str]], str | None], reason: str, good: int = 0
) -> tuple[int, str]:
    """Return how many of the names, in their order, are refused for the first time, and why.

    Args:
        names: units that cannot go together.
        attempt: returns why some of them cannot, or None.
        reason: why all of them cannot.
        good: so many of the first are known to go. What is in the way often comes in a row, so the
            next ones are tried first, twice as many each time; then the place is found by halving.
    """
    bad, step = len(names), 1
    while good + step < bad:
        found = attempt(names[: good + step])
        if found is not None:
            bad, reason = good + step, found
            break
        good, step = good + step, 2 * step
    while bad - good > 1:
        middle = (good + bad) // 2
        found = attempt(names[:middle])
        if found is None:
            good = middle
        else:
            bad, reason = middle, found
    return bad, reason


def unabsorbed(model: nn.Module, graph: Graph, remove: tuple[str, ...]) -> list[str]:
    """Return the units among ``remove`` whose control would stay as a multiply, as they stand."""
    keep: frozenset[int] = frozenset()
    while True:
        try:
            todo = decide(model, graph, remove, fuse=True, keep=keep)
            tie_factors(todo, fuse=True)
            break
        except MustStayError as again:
            keep |= again.nodes
    paths = {p: m.unit or p for p, m in model.named_modules() if isinstance(m, Gate)}
    return [paths[p] for p in todo.multiply if paths[p] in remove]


def _why_not(
    model: nn.Module,
    graph: Graph,
    names: tuple[str, ...],
    fuse: bool,
    indexed: set[int],
    blocks: list[Candidate],
) -> str | None:
    try:
        todo, edits = decisions(model, graph, names, fuse=fuse, indexed=indexed, blocks=blocks)
        if len(names) == 1 and (path := _still_run(model, todo, edits)) is not None:
            return (
                f"{path} would still run, though nothing reads what it computes: the forward that calls it "
                "is not the one that adds"
            )
    except ResConvError as error:
        return str(error).rstrip(".")
    except Exception as error:
        # Whatever it is, it would meet prune as well, after the training.
        return f"removing it fails ({type(error).__name__}: {error})"
    return None


def _still_run(model: nn.Module, todo: Surgery, edits: list[Edit]) -> str | None:
    """Return a module that runs in the net without a unit, and that nothing else needs; or None.

    A branch may reach back into a module whose forward stays as it is (an encoder that returns a list
    of feature maps): what the unit is said to save would not be saved.
    """
    graph = todo.graph
    rewritten = {e.path for e in edits if isinstance(e, Bypass)}
    replaced = {e.path for e in edits if not isinstance(e, Bypass)}
    for call in graph.calls:
        if not todo.is_dead(call) or call.parent is None or todo.is_dead(call.parent):
            continue
        if isinstance(call.parent.module, Gate) or not any(
            graph.nodes[i].macs for i in range(call.start, call.end)
        ):
            continue
        path = original_path(model, call.path)
        around = [path, *(path[:i] for i, c in enumerate(path) if c == ".")]
        # A forward that is rewritten calls nothing that nobody reads.
        if original_path(model, call.parent.path) not in rewritten and replaced.isdisjoint(around):
            return path
    return None


@contextmanager
def generic(controls: list[nn.Parameter], low: float = 0.5, high: float = 1.0) -> Iterator[None]:
    """Give the controls values in a range for the time of the block, no two the same in it."""
    with kept(controls):
        with torch.no_grad():
            for i, control in enumerate(controls):
                control.fill_(low + (high - low) * (i + 1) / (len(controls) + 1))
        yield
