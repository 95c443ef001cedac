"""Forwards rewritten by earlier versions, as their saved files describe them.

There a rewritten module became a ``torch.fx.GraphModule`` of its forward in eval mode, holding only
what it calls. An edit ``bypass`` without ``removed`` is one of these, and is replayed as it was.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from ..errors import PruneError
from ..failures import is_own
from .arguments import FREE, decode
from .edit_kinds import Bypass
from .tracing import OTHER_BRANCH, digest, pass_by

__all__ = ["as_graph_module"]


class _EarlierForward(fx.Tracer):
    def __init__(self, branches: Iterable[bool | int] = ()) -> None:
        super().__init__()
        self.branches = list(branches)

    def to_bool(self, obj: Any) -> bool:
        if not self.branches:
            raise PruneError("it branches more often than it did")
        chosen = bool(self.branches.pop(0))
        held = obj if chosen else self.create_proxy("call_function", operator.not_, (obj,), {})
        self.create_proxy("call_function", torch._assert, (held, OTHER_BRANCH), {})
        return chosen

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _placeholders(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_placeholders(v) for v in value)
    if isinstance(value, dict):
        return {k: _placeholders(v) for k, v in value.items()}
    return fx.PH if value is FREE else value  # type: ignore[attr-defined]


def as_graph_module(module: nn.Module, edit: Bypass) -> nn.Module:
    """Return the module that the edit of an earlier version describes.

    Raises:
        PruneError: the edit does not fit the module's forward.
    """
    path = edit.path
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        fixed = {name: _placeholders(decode(v)) for name, v in edit.constants.items()}
        tracer = _EarlierForward(edit.branches)
        graph = tracer.trace(module, concrete_args=fixed or None)
    except Exception as error:  # torch.fx runs the module's own forward, which is the user's code
        if is_own(error):
            raise
        raise PruneError(f"The forward of {path!r} cannot be rewritten: {error}") from error
    finally:
        for m, mode in modes:
            m.training = mode
    if digest(graph) != edit.code:
        raise PruneError(
            f"The forward of {path!r} ({type(module).__name__}) differs from the one that was "
            "pruned. Use the same version of the library the model comes from."
        )
    pass_by(graph, edit.nodes, path)
    graph._tracer_cls = None  # or a copy of it would ask for this tracer's arguments
    return fx.GraphModule(module, graph, type(module).__name__)
