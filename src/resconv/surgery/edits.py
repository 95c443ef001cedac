"""Edits of a module tree (see edit_kinds.py) carried out; replaying runs nothing but this file and the
constructors named in it.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from msgspec import UNSET
from msgspec.structs import asdict
from torch import fx, nn

from ..analysis.graph import Graph
from ..errors import PruneError
from ..failures import is_own
from ..nn.shortcuts import built, in_mode_of
from . import edit_kinds as kinds
from .arguments import template
from .earlier import as_graph_module
from .merging import merged
from .rewritten import (
    Blended,
    Clone,
    Factor,
    Softened,
    attributes_of,
    rewrite_forward,
    stand_in,
)
from .state import set_submodule
from .tracing import digest, pass_by, trace_forward

__all__ = [
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


def apply_edits(model: nn.Module, edits: Iterable[kinds.Edit]) -> nn.Module:
    """Replay structural edits on ``model``, in place, and return it.

    Where the model's own forward was rewritten, what comes back is a new root.

    Raises:
        PruneError: an edit does not fit the model.
    """
    for edit in edits:
        model = apply_edit(model, edit)
    return model


def apply_edit(model: nn.Module, edit: kinds.Edit) -> nn.Module:
    """Replay one edit on ``model``, in place, and return it; see :func:`apply_edits`."""
    path = edit.path
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise PruneError(
            f"The edits name {path!r}, which {type(model).__name__} does not have. "
            "Was the model's source changed since?"
        ) from None
    if not path and not isinstance(edit, kinds.Bypass):
        name = type(edit).__name__.lower()
        raise PruneError(f"An edit {name!r} cannot replace the whole model.")
    known = {id(m) for m in module.modules()}
    new = _edited(module, edit)
    for made in new.modules():  # each module that was there keeps its own mode
        if id(made) not in known:
            made.training = module.training
    if isinstance(edit, kinds.Replace | kinds.Blend):
        in_mode_of(new.left if isinstance(new, Blended) else new, module)
    if not path:
        return new
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if not isinstance(edit, kinds.Drop):
        set_submodule(model, path, new)
        return model
    if not _is_plain_sequential(parent) or not isinstance(module, nn.Identity):
        raise PruneError(f"{path!r} is no identity in an nn.Sequential, so it cannot be taken out.")
    if len(list(parent.children())) > 1:
        delattr(parent, name)
    return model


def _is_plain_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class _IndexReads:
    """Which threads are told of ``nn.Sequential`` that code reads by index, while any is.

    Python looks ``[]`` up in the class, so an instance cannot tell that it was indexed; giving it
    another class meanwhile would be seen by ``type(m) is nn.Sequential`` in a forward, and by copies
    and pickles made meanwhile. The method of torch's class is therefore wrapped, and only while a
    surgery records: it hands every value out as before, notes what the recording thread itself
    reads, and the last recording puts the original back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: list[tuple[int, set[int]]] = []  # of which thread, and the ids that it read
        self._undo: Callable[[], None] | None = None

    def add(self, reader: tuple[int, set[int]]) -> None:
        with self._lock:
            if not self._readers:
                self._undo = self._wrap()
            self._readers = [*self._readers, reader]

    def remove(self, reader: tuple[int, set[int]]) -> None:
        with self._lock:
            self._readers = [r for r in self._readers if r is not reader]
            if not self._readers and self._undo is not None:
                self._undo()

    def _wrap(self) -> Callable[[], None]:
        original = nn.Sequential.__getitem__

        @functools.wraps(original)
        def watched(container: nn.Sequential, index: Any) -> Any:
            for thread, seen in self._readers:
                if thread == threading.get_ident():
                    seen.add(id(container))
            return original(container, index)

        def undo() -> None:
            if nn.Sequential.__getitem__ is watched:  # else someone has wrapped it once more
                nn.Sequential.__getitem__ = original  # type: ignore[method-assign]

        nn.Sequential.__getitem__ = watched  # type: ignore[method-assign]
        return undo


_index_reads = _IndexReads()


@contextmanager
def indexed_containers() -> Iterator[set[int]]:
    """Collect the ids of all ``nn.Sequential`` that this thread reads by index meanwhile."""
    reader = threading.get_ident(), set[int]()
    _index_reads.add(reader)
    try:
        yield reader[1]
    finally:
        _index_reads.remove(reader)


def droppable(model: nn.Module, graph: Graph, path: str, indexed: set[int]) -> bool:
    """Whether nothing but its ``nn.Sequential`` runs the module, and no code counts positions there."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if not _is_plain_sequential(parent) or id(parent) in indexed:
        return False
    calls = graph.calls_of(path)
    return bool(calls) and all(c.parent is not None and c.parent.module is parent for c in calls)


def _edited(module: nn.Module, edit: kinds.Edit) -> nn.Module:
    path = edit.path
    match edit:
        case kinds.Identity():
            return stand_in(module)
        case kinds.Drop():
            return module
        case kinds.Merge():
            return merged(module, path)
        case kinds.Outplace():
            if not isinstance(getattr(module, "inplace", None), bool):
                raise PruneError(f"{path!r} ({type(module).__name__}) has no in-place mode.")
            module.inplace = False  # type: ignore[assignment]
            return module
        case kinds.Clone() | kinds.Copy():
            return Clone(only_for_gradients=isinstance(edit, kinds.Copy))
        case kinds.Conv():
            return _conv(module, edit)
        case kinds.Children():
            return _children(module, edit)
        case kinds.Multiply():
            return Factor(edit.factor)
        case kinds.Append():
            return nn.Sequential(module, Factor(edit.factor))
        case kinds.Replace() | kinds.Blend():
            return _with_layers(module, edit)
        case kinds.Soften():
            return nn.Sequential(module, Softened(edit.factor))
        case kinds.Bypass():
            return _bypassed(module, edit)


def _conv(module: nn.Module, edit: kinds.Conv) -> nn.Module:
    weight = getattr(module, "weight", None)
    like = weight if isinstance(weight, torch.Tensor) else torch.empty(0)
    given = {k: v for k, v in asdict(edit.args).items() if v is not UNSET}
    try:
        made = _CONVS[edit.type](**given, device=like.device, dtype=like.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PruneError(f"Not a convolution at {edit.path!r}: {error}") from error
    for parameter in made.parameters():
        parameter.requires_grad_(like.requires_grad or not like.numel())
    return made


def _with_layers(module: nn.Module, edit: kinds.Replace | kinds.Blend) -> nn.Module:
    own = next((p for p in module.parameters() if p.is_floating_point()), None)
    try:
        made = built(edit.layers, own)
    except (ValueError, TypeError) as error:
        raise PruneError(f"Not the layers of a segment at {edit.path!r}: {error}") from error
    if own is not None:
        made.requires_grad_(any(p.requires_grad for p in module.parameters()))
    found: nn.Module = made[0] if len(made) == 1 else made
    if isinstance(edit, kinds.Blend):
        found = Blended(module, made if len(made) else nn.Identity(), edit.factor)
    for name, value in attributes_of(module).items():
        if not hasattr(found, name):  # code around it may read them
            setattr(found, name, value)
    return found


def _children(module: nn.Module, edit: kinds.Children) -> nn.Module:
    children = dict(module.named_children())
    if any(n not in children for n in edit.names):
        raise PruneError(f"{edit.path!r} has not the children {list(edit.names)!r}.")
    kept = [children[n] for n in edit.names if not isinstance(children[n], nn.Identity)]
    if not kept:
        return nn.Identity()
    return kept[0] if len(kept) == 1 else nn.Sequential(*kept)


def _bypassed(module: nn.Module, edit: kinds.Bypass) -> nn.Module:
    if edit.removed is None:
        return as_graph_module(module, edit)
    graph = _replayed(module, edit, edit, training=False)
    in_training = None
    if edit.training is not None:
        in_training = _replayed(module, edit, edit.training, training=True)
    arguments = template(inspect.signature(module.forward), edit.constants)
    _remove(module, edit.removed, edit.path)
    rewrite_forward(module, arguments, graph, in_training)
    return module


def _replayed(
    module: nn.Module,
    edit: kinds.Bypass,
    form: kinds.Bypass | kinds.TrainingForward,
    *,
    training: bool,
) -> fx.Graph:
    """Return the graph of the module's forward without the operations that ``form`` passes by."""
    path = edit.path
    branches = iter(form.branches)

    def decide(node: fx.Node) -> bool | int:
        for branch in branches:
            return branch
        raise PruneError(f"The forward of {path!r} branches more often than it did.")

    try:
        trace = trace_forward(module, edit.constants, decide, training=training)
    except PruneError:
        raise
    except Exception as error:  # torch.fx runs the module's own forward, which is the user's code
        if is_own(error):
            raise
        raise PruneError(f"The forward of {path!r} cannot be rewritten: {error}") from error
    if digest(trace.graph) != form.code:
        raise PruneError(
            f"The forward of {path!r} ({type(module).__name__}) differs from the one that was "
            "pruned. Use the same version of the library the model comes from."
        )
    pass_by(trace.graph, form.nodes, path)
    return trace.graph


def _remove(module: nn.Module, names: Iterable[str], path: str) -> None:
    """Let identities and ``None`` stand for the children and parameters of the given paths."""
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
