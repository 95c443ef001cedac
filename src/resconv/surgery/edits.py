"""Structural edits of a module tree, as plain data: made by ``prune``, replayed by ``load``.

    conv      put an ordinary convolution of the given geometry at ``path``
    identity  the module at ``path`` does nothing any more
    drop      the identity at ``path`` is taken out of its ``nn.Sequential``
    clone     the module at ``path`` only copies its input (an in-place operation behind it would
              otherwise write into a value that is still needed)
    outplace  the activation at ``path`` no longer writes in place, for the same reason
    children  the module at ``path`` runs only the named children of itself, in that order
    bypass    in the forward of the module at ``path``, the named operations return one of their
              arguments; the module becomes a ``torch.fx.GraphModule`` of its own forward, with
              the branches on sizes taken as they were (``branches``)
    multiply  a constant factor that could not be absorbed, in place of the module at ``path``
    append    the same, behind the module at ``path``

Replaying runs nothing but this file and the constructors named in it.
"""

import hashlib
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..analysis.graph import Graph, Ref
from ..errors import PruneError

__all__ = [
    "CONV_GEOMETRY",
    "apply_edit",
    "apply_edits",
    "droppable",
    "encode",
    "indexed_containers",
    "trace_forward",
]

_CONVS: dict[str, type[nn.Module]] = {
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
}
_FIELDS = {
    "conv": {"path", "type", "args"},
    "identity": {"path"},
    "drop": {"path"},
    "clone": {"path"},
    "outplace": {"path"},
    "children": {"path", "names"},
    "bypass": {"path", "constants", "nodes", "code"},
    "multiply": {"path", "factor"},
    "append": {"path", "factor"},
}
_OPTIONAL = {"_original", "branches"}
CONV_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


_OTHER_BRANCH = (
    "This forward was rewritten by resconv for its example's size, and branches on it: convert and "
    "prune with an example of the size that you run."
)


class _OwnForward(fx.Tracer):
    """Traces one module's own forward; every module it calls stays a call.

    A branch on a size is decided by ``decide``, and the decision is asserted in the graph: on an
    input for which it would fall the other way, the rewritten forward stops.
    """

    def __init__(self, decide: Callable[[fx.Node], bool]) -> None:
        super().__init__()
        self.decide = decide
        self.branches: list[bool] = []

    def to_bool(self, obj: Any) -> bool:
        chosen = self.decide(obj.node)
        self.branches.append(chosen)
        held = obj if chosen else self.create_proxy("call_function", operator.not_, (obj,), {})
        self.create_proxy("call_function", torch._assert, (held, _OTHER_BRANCH), {})
        return chosen

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def encode(value: Any, free: bool) -> Any:
    """Return an argument as plain data for an edit; with ``free`` its numbers are not fixed.

    Raises:
        TypeError: it holds something that is neither a value of the record nor a plain one.
    """
    if isinstance(value, Ref):
        return {"free": True}
    if isinstance(value, tuple | torch.Size) and not hasattr(value, "_fields"):
        return {"tuple": [encode(v, free) for v in value]}
    if isinstance(value, list):
        return [encode(v, free) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encode(v, free) for k, v in value.items()}}
    if isinstance(value, bool | int | float | str | type(None)):
        return {"free": True} if free else value
    raise TypeError(f"a {type(value).__name__} is no plain value")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, dict):
        if value == {"free": True}:
            return fx.PH  # type: ignore[attr-defined]
        if set(value) == {"tuple"} and isinstance(value["tuple"], list):
            return tuple(_decode(v) for v in value["tuple"])
        if set(value) == {"dict"} and isinstance(value["dict"], dict):
            return {k: _decode(v) for k, v in value["dict"].items()}
        raise PruneError(f"Not an argument: {str(value)[:100]}")
    return value


def trace_forward(
    module: nn.Module, constants: dict[str, Any], decide: Callable[[fx.Node], bool]
) -> tuple[fx.Graph, list[bool]]:
    """Return the graph of the module's own forward, and the branches it took.

    Arguments in ``constants`` (encoded) are fixed; ``decide`` says which way a branch goes.
    """
    constants = {name: _decode(value) for name, value in constants.items()}
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    tracer = _OwnForward(decide)
    try:
        return tracer.trace(module, concrete_args=constants or None), tracer.branches
    finally:
        for m, mode in modes:
            m.training = mode


def digest(graph: fx.Graph) -> str:
    """Return a checksum of the operations in a graph."""
    lines = [f"{n.op} {n.name} {n.target if n.op == 'call_module' else ''}" for n in graph.nodes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def apply_edits(model: nn.Module, edits: list[dict[str, Any]]) -> nn.Module:
    """Replay structural edits on ``model``, in place, and return it.

    Where the model's own forward was rewritten, what comes back is a new root.

    Raises:
        PruneError: an edit is malformed, or does not fit the model.
    """
    if not isinstance(edits, list):
        raise PruneError(f"edits must be a list, not a {type(edits).__name__}.")
    for edit in edits:
        model = apply_edit(model, edit)
    return model


def apply_edit(model: nn.Module, edit: dict[str, Any]) -> nn.Module:
    """Replay one edit on ``model``, in place, and return it; see :func:`apply_edits`."""
    op = edit.get("op") if isinstance(edit, dict) else None
    if (
        op not in _FIELDS
        or set(edit) - _OPTIONAL != _FIELDS[op] | {"op"}
        or not isinstance(edit["path"], str)
    ):
        raise PruneError(f"Not an edit: {str(edit)[:200]}")
    path = edit["path"]
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise PruneError(
            f"The edits name {path!r}, which {type(model).__name__} does not have. "
            "Was the model's source changed since?"
        ) from None
    if not path and op != "bypass":
        raise PruneError(f"An edit {op!r} cannot replace the whole model.")
    known = {id(m) for m in module.modules()}
    new = _edited(module, edit)
    for made in new.modules():  # each module that was there keeps its own mode
        if id(made) not in known:
            made.training = module.training
    if not path:
        return new
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if op != "drop":
        setattr(parent, name, new)
        return model
    if not _is_plain_sequential(parent) or not isinstance(module, nn.Identity):
        raise PruneError(f"{path!r} is no identity in an nn.Sequential, so it cannot be taken out.")
    if len(list(parent.children())) > 1:
        delattr(parent, name)
    return model


def _is_plain_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


@contextmanager
def indexed_containers() -> Iterator[set[int]]:
    """Collect the ids of all ``nn.Sequential`` that code reads by index meanwhile."""
    seen: set[int] = set()
    original = nn.Sequential.__getitem__

    def watched(self: nn.Sequential, index: Any) -> Any:
        seen.add(id(self))
        return original(self, index)

    nn.Sequential.__getitem__ = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        nn.Sequential.__getitem__ = original  # type: ignore[method-assign]


def droppable(model: nn.Module, graph: Graph, path: str, indexed: set[int]) -> bool:
    """Whether nothing but its ``nn.Sequential`` runs the module, and no code counts positions there."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if not _is_plain_sequential(parent) or id(parent) in indexed:
        return False
    calls = graph.calls_of(path)
    return bool(calls) and all(c.parent is not None and c.parent.module is parent for c in calls)


def _edited(module: nn.Module, edit: dict[str, Any]) -> nn.Module:
    op, path = edit["op"], edit["path"]
    if op == "identity":
        return nn.Identity()
    if op == "drop":
        return module
    if op == "outplace":
        if not isinstance(getattr(module, "inplace", None), bool):
            raise PruneError(f"{path!r} ({type(module).__name__}) has no in-place mode.")
        module.inplace = False  # type: ignore[assignment]
        return module
    if op == "clone":
        copying = fx.Graph()
        copying.output(copying.call_method("clone", (copying.placeholder("x"),)))
        return fx.GraphModule(nn.Module(), copying, "Clone")
    if op == "conv":
        args = edit["args"]
        if (
            edit["type"] not in _CONVS
            or not isinstance(args, dict)
            or not set(args) <= {*CONV_GEOMETRY, "bias"}
        ):
            raise PruneError(f"Not a convolution at {path!r}: {str(edit)[:200]}")
        weight = getattr(module, "weight", None)
        like = weight if isinstance(weight, torch.Tensor) else torch.empty(0)
        try:
            made = _CONVS[edit["type"]](
                **{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()},
                device=like.device,
                dtype=like.dtype,
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise PruneError(f"Not a convolution at {path!r}: {error}") from error
        for parameter in made.parameters():
            parameter.requires_grad_(like.requires_grad or not like.numel())
        return made
    if op == "children":
        names = edit["names"]
        children = dict(module.named_children())
        if not isinstance(names, list) or any(n not in children for n in names):
            raise PruneError(f"{path!r} has not the children {names!r}.")
        kept = [children[n] for n in names if not isinstance(children[n], nn.Identity)]
        if not kept:
            return nn.Identity()
        new: nn.Module = kept[0] if len(kept) == 1 else nn.Sequential(*kept)
        return new
    if op in ("multiply", "append"):
        factor = edit["factor"]
        if not isinstance(factor, float | int) or isinstance(factor, bool):
            raise PruneError(f"The factor at {path!r} is no number: {factor!r}")
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_function(operator.mul, (x, float(factor))))
        multiply = fx.GraphModule(nn.Module(), graph, "Multiply")
        return multiply if op == "multiply" else nn.Sequential(module, multiply)
    return _bypassed(module, edit)


def _bypassed(module: nn.Module, edit: dict[str, Any]) -> nn.Module:
    path = edit["path"]
    branches = list(edit.get("branches", ()))
    try:
        graph, _ = trace_forward(module, edit["constants"], lambda node: bool(branches.pop(0)))
    except Exception as error:
        raise PruneError(f"The forward of {path!r} cannot be rewritten: {error}") from error
    if digest(graph) != edit["code"]:
        raise PruneError(
            f"The forward of {path!r} ({type(module).__name__}) differs from the one that was "
            "pruned. Use the same version of the library the model comes from."
        )
    by_name = {n.name: n for n in graph.nodes}
    read = {n for n in graph.nodes if n.users}
    for name, argument in edit["nodes"]:
        node = by_name.get(name)
        if node is None or not isinstance(argument, int) or len(node.args) <= argument:
            raise PruneError(f"The forward of {path!r} has no operation {name!r} to pass by.")
        replacement = node.args[argument]
        if not isinstance(replacement, fx.Node):
            raise PruneError(f"Operation {name!r} of {path!r} does not pass a value on.")
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    # An operation nobody read from the start writes in place, or checks something: it stays.
    for node in reversed(list(graph.nodes)):
        if node in read and not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(module, graph, type(module).__name__)
