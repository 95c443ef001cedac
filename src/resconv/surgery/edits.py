"""Structural edits of a module tree, as plain data: made by ``prune``, replayed by ``load``.

    conv      put an ordinary convolution of the given geometry at ``path``
    identity  the module at ``path`` does nothing any more
    drop      the identity at ``path`` is taken out of its ``nn.Sequential``
    clone     the module at ``path`` only copies its input (an in-place operation behind it would
              otherwise write into a value that is still needed)
    copy      the same where a gradient is recorded, and nothing elsewhere (the value is needed in
              the backward pass alone)
    outplace  the activation at ``path`` no longer writes in place, for the same reason
    children  the module at ``path`` runs only the named children of itself, in that order
    bypass    in the forward of the module at ``path``, the named operations return one of their
              arguments, or a copy of it ("clone", "copy": only where it requires a gradient), as
              the third entry says (``training``: the same for its forward in training mode, where
              that is another), with the branches on sizes taken as they were (``branches``); what is
              ``removed`` with them gives way to identities. See rewritten.py
    multiply  a constant factor that could not be absorbed, in place of the module at ``path``
    append    the same, behind the module at ``path``
    replace   the named layers in the place of the module at ``path``, in a row (a segment's shortcut)
    blend     the module at ``path`` and the named layers beside it, weighed by a constant factor
    soften    1 plus a constant times what the module at ``path`` returns less 1, in its place
    merge     the module at ``path`` merges its training-time branches, by its own method

Replaying runs nothing but this file and the constructors named in it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..analysis.graph import Graph
from ..errors import PruneError
from ..nn.shortcuts import built
from .arguments import template
from .earlier import as_graph_module
from .merging import merged
from .rewritten import Blended, Clone, Factor, Softened, rewrite_forward, stand_in
from .state import set_submodule
from .tracing import digest, pass_by, trace_forward

__all__ = [
    "CONV_GEOMETRY",
    "apply_edit",
    "apply_edits",
    "droppable",
    "indexed_containers",
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
    "copy": {"path"},
    "outplace": {"path"},
    "children": {"path", "names"},
    "bypass": {"path", "constants", "nodes", "code"},
    "multiply": {"path", "factor"},
    "append": {"path", "factor"},
    "merge": {"path"},
    "replace": {"path", "layers"},
    "blend": {"path", "layers", "factor"},
    "soften": {"path", "factor"},
}
_OPTIONAL = {"_original", "branches", "training", "removed"}
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
        set_submodule(model, path, new)
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
        return stand_in(module)
    if op == "drop":
        return module
    if op == "merge":
        return merged(module, path)
    if op == "outplace":
        if not isinstance(getattr(module, "inplace", None), bool):
            raise PruneError(f"{path!r} ({type(module).__name__}) has no in-place mode.")
        module.inplace = False  # type: ignore[assignment]
        return module
    if op in ("clone", "copy"):
        return Clone(only_for_gradients=op == "copy")
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
    if op in ("replace", "blend"):
        return _with_layers(module, edit)
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
    if op in ("multiply", "append", "soften"):
        factor = edit["factor"]
        if not isinstance(factor, float | int) or isinstance(factor, bool):
            raise PruneError(f"The factor at {path!r} is no number: {factor!r}")
        if op == "soften":
            return nn.Sequential(module, Softened(float(factor)))
        multiply = Factor(float(factor))
        return multiply if op == "multiply" else nn.Sequential(module, multiply)
    return _bypassed(module, edit)


def _with_layers(module: nn.Module, edit: dict[str, Any]) -> nn.Module:
    path, factor = edit["path"], edit.get("factor", 0.0)
    own = next((p for p in module.parameters() if p.is_floating_point()), None)
    if not isinstance(factor, float | int) or isinstance(factor, bool):
        raise PruneError(f"The factor at {path!r} is no number: {factor!r}")
    try:
        made = built(edit["layers"], own)
    except (ValueError, TypeError) as error:
        raise PruneError(f"Not the layers of a segment at {path!r}: {error}") from error
    if own is not None:
        made.requires_grad_(any(p.requires_grad for p in module.parameters()))
    if edit["op"] == "blend":
        return Blended(module, made if len(made) else nn.Identity(), float(factor))
    if not len(made):
        raise PruneError(f"There are no layers to put at {path!r}.")
    return made[0] if len(made) == 1 else made


def _bypassed(module: nn.Module, edit: dict[str, Any]) -> nn.Module:
    path, removed, training = edit["path"], edit.get("removed"), edit.get("training")
    if removed is None:
        return as_graph_module(module, edit)
    graph = _replayed(module, edit, edit, training=False)
    in_training = None
    if training is not None:
        if set(training) - {"branches"} != {"nodes", "code"}:
            raise PruneError(f"Not a rewritten forward of {path!r}: {str(training)[:200]}")
        in_training = _replayed(module, edit, training, training=True)
    arguments = template(inspect.signature(module.forward), edit["constants"])
    _remove(module, removed, path)
    rewrite_forward(module, arguments, graph, in_training)
    return module


def _replayed(
    module: nn.Module, edit: dict[str, Any], form: dict[str, Any], *, training: bool
) -> fx.Graph:
    """Return the graph of the module's forward without the operations that ``form`` passes by."""
    path = edit["path"]
    branches = list(form.get("branches", ()))
    try:
        trace = trace_forward(
            module, edit["constants"], lambda node: branches.pop(0), training=training
        )
    except PruneError:
        raise
    except Exception as error:
        raise PruneError(f"The forward of {path!r} cannot be rewritten: {error}") from error
    if digest(trace.graph) != form["code"]:
        raise PruneError(
            f"The forward of {path!r} ({type(module).__name__}) differs from the one that was "
            "pruned. Use the same version of the library the model comes from."
        )
    pass_by(trace.graph, form["nodes"], path)
    return trace.graph


def _remove(module: nn.Module, names: Any, path: str) -> None:
    """Let identities and ``None`` stand for the children and parameters of the given paths."""
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise PruneError(f"Not the removed parts of {path!r}: {str(names)[:200]}")
    for name in names:
        owner_path, _, own = name.rpartition(".")
        try:
            owner = module.get_submodule(owner_path)
            part = getattr(owner, own)
        except AttributeError:
            raise PruneError(f"{path!r} has no {name!r} to remove.") from None
        if isinstance(part, nn.Module):
            setattr(owner, own, stand_in(part))
        elif own in owner._parameters or own in owner._buffers:
            setattr(owner, own, None)
