"""The edits of the module tree that carry out what a surgery decided.

A module that only passes its input on becomes an identity. Where a module's own forward has to
change (two branches in one block, a functional activation), that forward is traced by torch.fx with
every child as one call, and the operations are passed by; the trace is matched with the record by
running it once.
"""

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..analysis.graph import Graph, Ref
from ..analysis.inputs import evaluating
from ..analysis.recorder import record
from ..errors import PruneError, TraceError
from ..nn.gates import BranchGate, ResConv, is_leaf
from .decisions import MustStayError, Surgery, original_path
from .edits import digest, droppable, encode, trace_forward
from .inplace import unsafe_writes

__all__ = ["tree_edits"]


def tree_edits(model: nn.Module, todo: Surgery) -> list[dict[str, Any]]:
    """Return the edits of the module tree that carry out what the values say."""
    graph = todo.graph
    times: dict[str, int] = {}
    for call in graph.calls:
        times[call.path] = times.get(call.path, 0) + 1
    identities: list[str] = []
    covered: set[int] = set()
    for call in graph.calls:
        if not call.path or any(call.path.startswith(p + ".") for p in identities):
            continue
        if any(call.path == p for p in identities):
            continue
        if not isinstance(call.output, Ref) or len(call.args) != 1 or call.kwargs:
            continue
        if not isinstance(call.args[0], Ref) or call.output == call.args[0]:
            continue
        inside = [i for i in todo.bypassed if call.start <= i < call.end]
        if not inside or todo.resolve(call.output.value) != todo.resolve(call.args[0].value):
            continue
        module = call.module
        if times[call.path] > 1 or _has_hooks(module):
            continue
        identities.append(call.path)
        covered.update(range(call.start, call.end))
    outplace, cloned = unsafe_writes(todo, identities, covered)
    edits: list[dict[str, Any]] = [
        {"op": "clone" if p in cloned else "identity", "path": original_path(model, p)}
        for p in identities
    ]
    edits += [{"op": "outplace", "path": original_path(model, p)} for p in outplace]
    edits += [
        {"op": "multiply", "path": original_path(model, p), "factor": factor}
        for p, factor in todo.multiply.items()
        if isinstance(model.get_submodule(p), ResConv)
    ]
    appended: list[dict[str, Any]] = [
        {"op": "append", "path": original_path(model, p), "factor": factor}
        for p, factor in todo.multiply.items()
        if isinstance(model.get_submodule(p), BranchGate)
    ]
    rest: dict[str, list[int]] = {}
    for index in todo.bypassed:
        if index in covered or (index in todo.dead):
            continue
        owner = graph.nodes[index].call
        # A shared or childless activation is passed by where it is called.
        while owner.parent is not None and owner.args and _whole(graph, owner, index):
            owner = owner.parent
        rest.setdefault(owner.path, []).append(index)
    rewritten, stay = [], set()
    for path, indices in rest.items():
        try:
            rewritten.append(_rewrite(model, todo, path, sorted(indices)))
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
        {"op": "drop", "path": original_path(model, p)}
        for p in identities
        if p not in stay_put
        and p.rpartition(".")[0] not in rest
        and droppable(model, graph, p, todo.indexed)
    ]
    # Inner forwards first, so that an outer rewrite holds the rewritten inner one. What is put
    # behind a module comes last, as it gives all within another path.
    rewritten.sort(key=lambda e: -e["path"].count("."))
    appended.sort(key=lambda e: -e["path"].count("."))
    return edits + rewritten + appended


def _whole(graph: Graph, call: Any, index: int) -> bool:
    """Whether the call does nothing but this one operation."""
    nodes = [n for n in graph.nodes[call.start : call.end] if n.op != "empty"]
    return len(nodes) == 1 and nodes[0].index == index


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _rewrite(model: nn.Module, todo: Surgery, path: str, indices: list[int]) -> dict[str, Any]:
    """Return the edit that passes the operations by in the forward of the module at ``path``.

    Raises:
        PruneError: that forward cannot be rewritten.
    """
    graph = todo.graph
    module = model.get_submodule(path)
    calls = graph.calls_of(path)

    def refuse(why: str) -> PruneError:
        return PruneError(
            f"The forward of {path or type(model).__name__} ({type(module).__name__}) has to "
            f"be rewritten to remove a unit from it, and cannot be: {why}."
        )

    if len(calls) != 1:
        raise refuse(f"it is called {len(calls)} times in one pass")
    if _has_hooks(module):
        raise refuse("it carries hooks")
    call = calls[0]
    mine = graph.nodes[call.start : call.end]
    try:
        bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        signature = dict(bound.arguments)
        nested = {k for k, v in signature.items() if isinstance(v, tuple | list | dict) and v}
        kinds = {k: p.kind for k, p in bound.signature.parameters.items()}
        for k in nested:
            if kinds[k] in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                raise refuse(f"it takes any number of arguments ({k})")
        plain = {
            k: encode(v, False)
            for k, v in signature.items()
            if k not in nested and not isinstance(v, Ref) and (k in given or v not in ((), {}))
        }
    except TypeError as error:
        raise refuse(f"its arguments are not plain: {error}") from error
    why, found = "", None
    # A size handed on as a tuple should stay free; where the forward decides by it, it is fixed.
    for free in (True, False) if nested else (False,):
        try:
            constants = plain | {k: encode(signature[k], free) for k in nested}
            gm, branches, tags = _tagged(graph, module, signature, constants, nested)
        except Exception as error:
            why = why or f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
            continue
        # torch.fx turns `x += y` into `x + y`.
        if [n.op.rstrip("_") for n in mine] == [op.rstrip("_") for op, _ in tags]:
            found = constants, gm, branches, tags
            break
        why = why or "it does other things when it is traced"
    if found is None:
        raise refuse(why)
    constants, gm, branches, tags = found
    nodes = []
    for index in indices:
        name = tags[index - call.start][1]
        if name is None:
            raise refuse("an operation has no name in the trace")
        # A hook's work, say, is part of the call it hangs on.
        together = [call.start + i for i, tag in enumerate(tags) if tag[1] == name]
        if any(graph.nodes[i].op != "empty" and i not in indices for i in together):
            raise refuse(f"{name} does more than the operation that goes")
        nodes.append([name, todo.bypassed[index]])
    edit = {
        "op": "bypass",
        "path": original_path(model, path),
        "constants": constants,
        "nodes": nodes,
        "code": digest(gm.graph),
    }
    return edit | {"branches": branches} if branches else edit


class _Tagging(fx.Interpreter):
    current: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n.name
        return super().run_node(n)


def _tagged(
    graph: Graph,
    module: nn.Module,
    signature: dict[str, Any],
    constants: dict[str, Any],
    nested: set[str],
) -> tuple[fx.GraphModule, list[bool], list[tuple[str, str | None]]]:
    """Trace the module's own forward, and say which traced node ran each recorded operation."""

    def fill(ref: Any, device: torch.device) -> Any:
        if not isinstance(ref, Ref):
            return ref
        value = graph.values[ref.value]
        # In memory as it was recorded: whether reshape copies, and which product Linear takes,
        # depends on that.
        size = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride, strict=True))
        some = torch.rand(max(size, 1), device=device).to(value.dtype)
        return some.as_strided(value.shape, value.stride)

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    filled = {n: tree_map(lambda r: fill(r, device), v) for n, v in signature.items()}
    ordered = list(filled.values())
    known = {n: v for n, v in filled.items() if n not in nested}
    for n in nested:
        known |= {f"{n}_{i}": v for i, v in enumerate(tree_leaves(filled[n]), 1)}
    traced, branches = trace_forward(module, constants, lambda node: _decide(module, node, known))
    gm = fx.GraphModule(module, traced)
    names = [n.target for n in traced.nodes if n.op == "placeholder"]
    count = sum(len(tree_leaves(v)) if n in nested else 1 for n, v in signature.items())
    if len(names) != count:
        ordered = [t for t, n in zip(ordered, signature, strict=True) if n not in constants]
    interpreter = _Tagging(gm)

    class Runner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gm = gm

        def forward(self, *args: Any) -> Any:
            return interpreter.run(*args)

    seen = record(Runner(), tuple(ordered), leaf=is_leaf, tag=lambda: interpreter.current)
    return gm, branches, [(n.op, n.tag) for n in seen.nodes]


def _decide(module: nn.Module, condition: fx.Node, known: dict[str, Any]) -> bool:
    """Return what a condition comes to on the recorded shapes.

    Raises:
        TraceError: it depends on a tensor's numbers, which the next input may not share.
    """

    def value(node: fx.Node) -> Any:
        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if node.op == "placeholder":
            return known[str(node.target)]
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(module)
        if node.op == "call_module":
            return module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    with evaluating(module):
        found = value(condition)
    if not isinstance(found, bool | int | float):
        raise TraceError(f"it branches on the numbers in a {type(found).__name__}")
    return bool(found)
