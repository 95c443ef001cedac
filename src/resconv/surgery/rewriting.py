"""The edits of the module tree that carry out what a surgery decided.

A module that only passes its input on becomes an identity. Where a module's own forward has to
change (two branches in one block, a functional activation), that forward is traced by torch.fx with
every child as one call, in eval and in training mode, and the operations are passed by; the trace in
eval mode is matched with the record by running it once.
"""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..analysis.graph import Call, Graph, Node, Ref
from ..errors import PruneError, TraceError
from ..failures import is_own
from ..nn.gates import Blend, BranchGate, ResConv, Soften
from .arguments import encode
from .decisions import MustStayError, Surgery, original_path
from .edit_kinds import (
    Append,
    Bypass,
    Clone,
    Copy,
    Drop,
    Edit,
    Identity,
    Multiply,
    Outplace,
    PassedBy,
)
from .edits import droppable
from .forms import Form, device_of, fill, signature
from .inplace import Kind, Writes, same_flow, unsafe_writes
from .modes import both_modes, called
from .proof import trains_as_identity
from .rewritten import of_user

__all__ = ["tree_edits"]


def _passing_on(todo: Surgery) -> tuple[list[str], set[int]]:
    """Return the modules that only pass their input on, and the operations within them."""
    graph = todo.graph
    identities: list[str] = []
    covered: set[int] = set()
    for call in _around(graph, todo.bypassed):
        if not call.path or any(call.path.startswith(p + ".") for p in identities):
            continue
        if any(call.path == p for p in identities):
            continue
        module = call.module
        if isinstance(module, Blend | Soften):
            continue  # its gate goes, and with it the node
        read = _passed_on(call)
        if not isinstance(call.output, Ref) or read is None or call.output == read:
            continue
        if todo.resolve(call.output.value) != todo.resolve(read.value):
            continue
        if len(graph.calls_of(call.path)) > 1 or _has_hooks(module):
            continue
        if not _passes_on_in_training(graph, call, read):
            continue
        identities.append(call.path)
        covered.update(range(call.start, call.end))
    return identities, covered


def _of_modules(
    model: nn.Module, todo: Surgery, identities: list[str], cloned: dict[str, Kind], writes: Writes
) -> list[Edit]:
    """Return the edits of whole modules: what passes on, writes in place, or takes a factor."""
    silent: dict[str, type[Clone] | type[Copy]] = {"clone": Clone, "copy": Copy}
    edits: list[Edit] = [
        silent[cloned[p]](path) if p in cloned else Identity(path)
        for p, path in ((p, original_path(model, p)) for p in identities)
    ]
    edits += [Outplace(original_path(model, p)) for p in writes.outplace]
    return edits + [
        Multiply(original_path(model, p), factor)
        for p, factor in todo.multiply.items()
        if isinstance(model.get_submodule(p), ResConv)
    ]


def _by_forward(todo: Surgery, covered: set[int]) -> dict[str, list[int]]:
    """Return the other operations that are passed by, by the module whose forward holds them."""
    graph = todo.graph
    rest: dict[str, list[int]] = {}
    for index in todo.bypassed:
        if index in covered or (index in todo.dead):
            continue
        if isinstance(graph.nodes[index].call.module, Blend | Soften):
            continue
        owner = graph.nodes[index].call
        # A shared or childless activation is passed by where it is called.
        while owner.parent is not None and owner.args and _whole(graph, owner, index):
            owner = owner.parent
        rest.setdefault(owner.path, []).append(index)
    return rest


def tree_edits(model: nn.Module, todo: Surgery) -> list[Edit]:
    """Return the edits of the module tree that carry out what the values say.

    Raises:
        MustStayError: operations that need not go stand in a forward that cannot be rewritten.
        PruneError: so do others.
    """
    graph = todo.graph
    identities, covered = _passing_on(todo)
    writes = unsafe_writes(model, todo, covered)
    cloned = {
        call.path: writes.copies[i]
        for call in graph.calls
        if call.path in identities
        for i in writes.copies
        if call.start <= i < call.end
    }
    edits = _of_modules(model, todo, identities, cloned, writes)
    appended = [
        Append(original_path(model, p), factor)
        for p, factor in todo.multiply.items()
        if isinstance(model.get_submodule(p), BranchGate)
    ]
    rest = _by_forward(todo, covered)
    rewritten, stay = [], set()
    for path, indices in rest.items():
        try:
            rewritten.append(_rewrite(model, todo, path, sorted(indices), writes.copies))
        except PruneError:
            optional = todo.optional.intersection(indices)
            if not optional:
                raise
            stay |= optional
    if stay:
        raise MustStayError(stay)
    # Taken out before a forward is rewritten: the new one holds only what it calls.
    stay_put = {*cloned, *todo.multiply}
    edits += [
        Drop(original_path(model, p))
        for p in identities
        if p not in stay_put
        and p.rpartition(".")[0] not in rest
        and droppable(model, graph, p, todo.indexed)
    ]
    # Inner forwards first, so that an outer rewrite holds the rewritten inner one. What is put
    # behind a module comes last, as it gives all within another path.
    rewritten.sort(key=lambda e: -e.path.count("."))
    appended.sort(key=lambda e: -e.path.count("."))
    return [*edits, *rewritten, *appended]


def _around(graph: Graph, nodes: Iterable[int]) -> list[Call]:
    """Return the calls that run one of the nodes, in their order."""
    found: dict[int, Call] = {}
    for index in nodes:
        call: Call | None = graph.nodes[index].call
        while call is not None and call.index not in found:
            found[call.index] = call
            call = call.parent
    return [found[i] for i in sorted(found)]


def _passes_on_in_training(graph: Graph, call: Call, read: Ref) -> bool:
    if call.index not in graph.asking:
        return True  # it does the same there
    key = "passes on in training", call.path
    if key not in graph.known:
        like = fill(graph, read, device_of(call.module))
        graph.known[key] = trains_as_identity(call.module, like)
    return bool(graph.known[key])


def _passed_on(call: Call) -> Ref | None:
    """Return the argument that an identity in the place of this call would return."""
    if len(call.args) + len(call.kwargs) > 1 and not of_user(call.module):
        return None
    first: Any = call.args[0] if call.args else None
    if not call.args and call.kwargs:
        first = call.kwargs.get(next(iter(inspect.signature(call.module.forward).parameters)))
    return first if isinstance(first, Ref) else None


def _whole(graph: Graph, call: Any, index: int) -> bool:
    """Whether the call does nothing but this one operation."""
    nodes = [n for n in graph.nodes[call.start : call.end] if n.op != "empty"]
    return len(nodes) == 1 and nodes[0].index == index


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _rewrite(
    model: nn.Module, todo: Surgery, path: str, indices: list[int], copies: dict[int, Kind]
) -> Bypass:
    """Return the edit that passes the operations by in the forward of the module at ``path``.

    Raises:
        PruneError: that forward cannot be rewritten.
    """
    graph = todo.graph
    module = model.get_submodule(path)

    def refuse(why: str) -> PruneError:
        return PruneError(
            f"The forward of {path or type(model).__name__} ({type(module).__name__}) has to "
            f"be rewritten to remove a unit from it, and cannot be: {why}."
        )

    # The same for every plan: a trial of many units asks again and again.
    found = graph.known.get(("form", path))
    if found is None:
        found = graph.known["form", path] = _traced_as_recorded(graph, module, path)
    if isinstance(found, str):
        raise refuse(found)
    form, tags = found
    call = graph.calls_of(path)[0]
    nodes: list[PassedBy] = []
    optional: set[str] = set()
    for index in indices:
        name = tags[index - call.start].tag
        if name is None:
            raise refuse("an operation has no name in the trace")
        # A hook's work, say, is part of the call it hangs on.
        together = [call.start + i for i, n in enumerate(tags) if n.tag == name]
        if any(graph.nodes[i].op != "empty" and i not in indices for i in together):
            raise refuse(f"{name} does more than the operation that goes")
        nodes.append(PassedBy(name, todo.bypassed[index], copies.get(index)))
        if index in todo.optional:
            optional.add(name)
    running = form.trace.copy()
    try:
        edit = both_modes(running, form.in_training.copy(), nodes, optional)
    except Exception as error:  # torch.fx has many for a graph that does not hold together
        if is_own(error):
            raise
        line = str(error).partition(chr(10))[0][:160]
        raise refuse(
            "what it does in training mode cannot be kept "
            f"({'' if isinstance(error, TraceError) else type(error).__name__ + ': '}{line})"
        ) from error
    edit["removed"] = tuple(_outermost(module, graph, call, edit["removed"]))
    still = called(running.graph)
    if left := [n for n in _all_dead(todo, call) if n in still]:
        raise refuse(f"{left[0]} would still run, since other code uses more than its output")
    return Bypass(original_path(model, path), form.constants, **edit)


def _all_dead(todo: Surgery, call: Call) -> list[str]:
    """Return the children that run within the call, and for what is removed alone."""
    alive: dict[str, bool] = {}
    for c in todo.graph.calls:
        if c.parent is call:
            name = c.path.removeprefix(f"{call.path}." if call.path else "")
            alive[name] = alive.get(name, False) or not todo.is_dead(c)
    return [name for name, lives in alive.items() if not lives]


def _traced_as_recorded(
    graph: Graph, module: nn.Module, path: str
) -> tuple[Form, list[Node]] | str:
    """Return the module's own forward, traced, with what it runs; or why it cannot be rewritten."""
    calls = graph.calls_of(path)
    if len(calls) != 1:
        return f"it is called {len(calls)} times in one pass"
    if _has_hooks(module):
        return "it carries hooks"
    if getattr(vars(module).get("forward"), "__self__", module) is not module:
        return "its forward belongs to another object"
    call = calls[0]
    mine = graph.nodes[call.start : call.end]
    try:
        bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError) as error:
        return f"its arguments do not fit its signature: {error}"
    bound.apply_defaults()
    given = dict(bound.arguments)
    why = ""
    # A size that is handed on should stay free; where the code needs to know it, it is fixed.
    # Tensors without numbers cost nothing, and some code does not run on them.
    for free, fake in ((True, True), (True, False), (False, True), (False, False)):
        try:
            form = Form(graph, module, given, _constants(given, free), fake=fake)
            key = form.text, signature(graph, call)
            if (seen := graph.matched.get(key)) is not None:
                return form, seen
            ran = form.ran()
        except Exception as error:  # whatever the user's forward raises when it is traced
            if is_own(error):
                raise
            if not fake:
                why = why or f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
            continue
        # torch.fx turns `x += y` into `x + y`.
        if [n.op.rstrip("_") for n in mine] != [n.op.rstrip("_") for n in ran]:
            why = why or "it does other things when it is traced"
        elif not same_flow(mine, ran):
            why = why or "it writes into a tensor that it also reads under another name"
        else:
            graph.matched[key] = ran
            return form, ran
    return why


def _constants(given: dict[str, Any], free: bool) -> dict[str, Any]:
    """Return the arguments that are no single free value, as plain data."""
    every = {name: encode(value, free) for name, value in given.items()}
    return {name: value for name, value in every.items() if value != {"free": True}}


def _outermost(module: nn.Module, graph: Graph, call: Call, names: list[str]) -> list[str]:
    """Return what of the named parts nobody else uses, with all its names within the module."""
    prefix = f"{call.path}." if call.path else ""
    parts = dict(module.named_modules(remove_duplicate=False))
    gone: list[str] = []
    for name in names:
        elsewhere = [
            c
            for c in graph.calls
            if f"{c.path}.".startswith(f"{prefix}{name}.")
            and not (call.start <= c.start and c.end <= call.end)
        ]
        if not elsewhere:
            part = parts.get(name)
            gone.append(name)
            gone += [n for n, m in parts.items() if part is not None and m is part and n != name]
    return [n for n in gone if not any(n.startswith(f"{other}.") for other in gone)]
