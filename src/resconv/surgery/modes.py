"""One removal in both modes of a forward: what goes in eval mode is found again in training mode.

The two traces of one piece of code differ where it asks for ``self.training``. An operation is the
same in both where it stands at the same instruction; else an addition is found by the modules in its
branch. A training path that still needs what was removed cannot be kept.
"""

from typing import Any

from torch import fx

from ..errors import PruneError
from .edit_kinds import PassedBy, TrainingForward
from .tracing import Trace, digest, pass_by, used

__all__ = ["both_modes", "called"]


def both_modes(
    running: Trace, training: Trace, nodes: list[PassedBy], optional: set[str]
) -> dict[str, Any]:
    """Return the fields of the edit that passes the named operations by; the traces are used up.

    ``optional`` are operations that may stay where they are not found.

    Raises:
        PruneError: the training path cannot be kept.
    """
    code, code_in_training = digest(running.graph), digest(training.graph)
    nodes_in_training: list[PassedBy] = []
    for passed in nodes:
        found = _counterpart(running, training, passed.name, passed.argument)
        if found is not None:
            name, argument = found
            nodes_in_training.append(PassedBy(name, argument, passed.copy))
        elif passed.name not in optional:
            raise PruneError(f"{passed.name} is not done the same way there")
    before = used(running.graph, training.graph)
    before_called = called(running.graph)
    pass_by(running.graph, nodes, "eval mode")
    pass_by(training.graph, nodes_in_training, "training mode")
    still = (before_called - called(running.graph)) & called(training.graph)
    if still:
        raise PruneError(f"it still runs {', '.join(sorted(still)[:3])} there")
    form = TrainingForward(tuple(nodes_in_training), code_in_training, tuple(training.decisions))
    return {
        "nodes": tuple(nodes),
        "code": code,
        "branches": tuple(running.decisions),
        "training": None if _text(running.graph) == _text(training.graph) else form,
        "removed": sorted(before - used(running.graph, training.graph)),
    }


def _text(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def called(graph: fx.Graph) -> set[str]:
    """Return the modules that a graph runs."""
    return {str(n.target) for n in graph.nodes if n.op == "call_module"}


def _counterpart(running: Trace, training: Trace, name: str, argument: int) -> Any:
    """Return the name and argument of the same operation in training mode, or None."""
    node = next(n for n in running.graph.nodes if n.name == name)
    place = running.places[name]
    for other in training.graph.nodes:
        if training.places[other.name] == place and _alike(node, other):
            return other.name, argument
    if node.op == "call_module":
        mine = [n for n in running.graph.nodes if n.target == node.target]
        theirs = [n for n in training.graph.nodes if _alike(node, n)]
        return (theirs[mine.index(node)].name, argument) if len(mine) == len(theirs) else None
    branch = _branch(node, argument)
    found = [
        (other.name, position)
        for other in training.graph.nodes
        for position in range(min(2, len(other.args)))
        if branch and _branch(other, position) == branch
    ]
    return found[0] if len(found) == 1 else None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return a.op == b.op and a.target == b.target and len(a.args) == len(b.args)


def _branch(node: fx.Node, position: int) -> set[str]:
    """Return the modules that run between the argument at ``position`` and the other one."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if len(node.args) != 2 or len(operands) != 2:
        return set()
    stop, todo = operands[position], [operands[1 - position]]
    seen = {stop}
    while todo:
        each = todo.pop()
        if each not in seen:
            seen.add(each)
            todo += each.all_input_nodes
    seen.discard(stop)
    if any(n.op == "placeholder" for n in seen):
        return set()
    return {str(n.target) for n in seen if n.op == "call_module"}
