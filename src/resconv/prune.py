"""A gated model and a plan in, a plain shallower net out.

Removal sets ``s = 0``. What is left, ``y = p * x`` for a layer and ``y = x`` for a block, costs
nothing: the unit's value becomes its input's value, activations that no longer change anything go
with it, and the factors travel into linear layers (see scaling.py). The tree of modules is then
edited: a module that only passes its input on becomes an identity, and where a module's own forward
has to change (two branches in one block, a functional activation) that forward is rewritten.
"""

import copy
import math
from typing import Any

from torch import Tensor, nn

from .absorb import absorb, tie_factors
from .convert import State, set_submodule, state_of
from .edits import apply_edits
from .errors import PlanError, PruneError
from .fold import conv_edit, fill_convs
from .gates import BranchGate, Gate, ResConv, gates, is_leaf
from .ops import bounds, kind
from .plan import Plan
from .rewrite import tree_edits
from .surgery import Surgery, original_path
from .trace import Ref, record, unwrap
from .units import find_blocks

__all__ = ["leftovers", "operate", "prune"]

_IDEMPOTENT = {"relu", "hardtanh", "clamp"}


def prune(model: nn.Module, plan: Plan, *, fuse: bool = True) -> nn.Module:
    """Return the net without the planned units; ``model`` is left as it was.

    With ``fuse=True`` no resconv module is left in it. With ``fuse=False`` the units that stay keep
    their training form, to be trained further and fused later.

    Raises:
        PlanError: the plan is empty, or names a unit that the model does not have.
        PruneError: a unit cannot be removed exactly; the reason is in the message.
    """
    every = gates(unwrap(model))
    if not plan.remove:
        raise PlanError(
            "The plan removes nothing. Train longer, raise the strength or the threshold, or call "
            "resconv.fuse(model) to get the whole net back."
        )
    unknown = [name for name in plan.remove if name not in every]
    if unknown:
        raise PlanError(
            f"The model has no removable unit named {', '.join(map(repr, unknown[:5]))}. It has "
            f"{len(every)}: {', '.join(list(every)[:8])}{' ...' if len(every) > 8 else ''}. "
            "`resconv.units(model, example_inputs)` lists why other layers are kept."
        )
    return operate(model, tuple(plan.remove), fuse=fuse)


def operate(model: nn.Module, remove: tuple[str, ...], *, fuse: bool) -> nn.Module:
    """Remove the named units and, with ``fuse``, turn every other gate into ordinary layers."""
    model = unwrap(model)
    state = state_of(model)
    model = copy.deepcopy(model)
    state = copy.copy(state)
    state.edits = list(state.edits)
    graph = record(model, state.example_inputs, leaf=is_leaf)
    if fuse:
        # A branch that counts nothing need not be computed, whether it was planned or not.
        remove += tuple(
            name
            for name, gate in gates(model).items()
            if isinstance(gate, BranchGate) and gate.scale.item() == 0 and name not in remove
        )
    todo = Surgery(graph)
    _take_out(model, todo, remove)
    kept = tie_factors(model, todo, fuse)
    absorb(model, todo, fuse)
    structure = tree_edits(model, todo)
    convs: list[dict[str, Any]] = []
    kernels: dict[str, tuple[Tensor, Tensor | None]] = {}
    for path, (weight, bias, like) in kept.items():
        original = original_path(model, path)
        convs.append(conv_edit(original, like, bias is not None))
        kernels[original] = (weight, bias)
    model = _without_gates(model, everything=fuse, removed=remove)
    if not fuse:
        structure = [_gated_path(model, e) for e in structure]
    # Kernels first: what is put behind a conv later gives it another path.
    model = apply_edits(model, convs)
    fill_convs(model, kernels)
    model = apply_edits(model, structure)
    state.edits += [_original_edit(e) for e in (*convs, *structure)]
    _label(model, state, fuse)
    return model


def _label(model: nn.Module, state: State, fuse: bool) -> None:
    if fuse:
        model.__dict__.pop("resconv_state", None)
        model.resconv_record = {"source": state.source, "edits": state.edits}  # type: ignore[assignment]
    else:
        model.resconv_state = state  # type: ignore[assignment]


def _take_out(model: nn.Module, todo: Surgery, remove: tuple[str, ...]) -> None:
    """Decide which values stand for which others once the units are gone."""
    graph = todo.graph
    every = gates(model)
    paths = {
        name: p
        for p, m in model.named_modules()
        for name in [getattr(m, "unit", None)]
        if isinstance(m, Gate) and name in remove
    }
    blocks = {c.gate: c for c in find_blocks(model, graph)}
    for name in remove:
        gate, path = every[name], paths[name]
        if isinstance(gate, BranchGate):
            candidate = blocks.get(path)
            if candidate is None or not candidate.unit.removable:
                raise PruneError(f"{name} is no residual branch of the recorded forward any more.")
            add = graph.nodes[candidate.add]
            position = next(i for i, a in enumerate(add.args[:2]) if a == Ref(candidate.value))
            todo.bypassed[add.index] = position
            todo.same_as[add.outputs[0]] = candidate.value
            todo.dead |= candidate.nodes
    for name in remove:
        gate, path = every[name], paths[name]
        if not isinstance(gate, ResConv):
            continue
        node = next((n for n in graph.nodes if n.op == "gate" and n.call.path == path), None)
        if node is None:
            raise PruneError(f"{name} does not run in the model's forward.")
        if node.index in todo.dead:
            continue
        assert gate.control is not None
        p = gate.control.item()
        if p == 0 or not math.isfinite(p):
            raise PruneError(
                f"{name} has control {p:g}: with scale 0 its output would be {p:g} everywhere. "
                "It never learned its shortcut; train it longer, convert with start='identity', "
                "or leave it out of the plan."
            )
        todo.bypassed[node.index] = 0
        todo.same_as[node.outputs[0]] = node.inputs[0]
    _drop_activations(model, todo, every)


def _drop_activations(model: nn.Module, todo: Surgery, every: dict[str, Gate]) -> None:
    """Pass by activations that a removed unit has made redundant (relu of a relu)."""
    graph = todo.graph
    known: list[tuple[float, float]] = [(-math.inf, math.inf)] * len(graph.values)
    after_removal: set[int] = set(todo.same_as)
    for node in graph.nodes:
        if node.index in todo.bypassed:
            low, high = known[node.inputs[todo.bypassed[node.index]]]
            if node.op == "gate":
                gate = node.call.module
                assert isinstance(gate, ResConv)
                assert gate.control is not None
                p = gate.control.item()
                low, high = sorted((p * low, p * high))
            span = (low, high)
        else:
            span = bounds(graph, node, known)
        if (
            node.op.removesuffix("_") in _IDEMPOTENT
            and node.index not in todo.dead
            and node.inputs[0] in after_removal
            and known[node.inputs[0]] == span
        ):
            todo.bypassed[node.index] = 0
            todo.same_as[node.outputs[0]] = node.inputs[0]
            after_removal.add(node.outputs[0])
        elif (
            len(node.inputs) == 1
            and node.inputs[0] in after_removal
            and kind(graph, node) == "homogeneous"
        ):
            # a copy or a dropout between the unit and its activation
            after_removal.update(node.outputs)
        for value in node.outputs:
            known[value] = span


def _without_gates(model: nn.Module, *, everything: bool, removed: tuple[str, ...]) -> nn.Module:
    """Put the layers that gates hold back in their places (in place)."""
    for path, module in list(model.named_modules())[::-1]:
        if not isinstance(module, Gate) or not (everything or module.unit in removed):
            continue
        inner: Any = module.module if isinstance(module, BranchGate) else module.conv
        set_submodule(model, path, inner)
    return model


def _gated_path(model: nn.Module, edit: dict[str, Any]) -> dict[str, Any]:
    """Point an edit at the same module of a model that keeps some gates."""
    module: nn.Module = model
    path = []
    for part in edit["path"].split(".") if edit["path"] else []:
        if isinstance(module, BranchGate):
            path.append("module")
            module = module.module
        path.append(part)
        module = getattr(module, part)
    # Edits speak of the original layers, which stand inside the gates that stay.
    while isinstance(module, BranchGate):
        path.append("module")
        module = module.module
    return {**edit, "path": ".".join(path), "_original": edit["path"]}


def _original_edit(edit: dict[str, Any]) -> dict[str, Any]:
    edit = dict(edit)
    edit["path"] = edit.pop("_original", edit["path"])
    return edit


def leftovers(compact: nn.Module) -> dict[str, float]:
    """Return the factors that no layer could absorb, by the path of the multiply."""
    edits = (getattr(compact, "resconv_record", None) or {}).get("edits", [])
    return {e["path"]: e["factor"] for e in edits if e["op"] in ("multiply", "append")}
