"""A gated model and a plan in, a plain shallower net out.

Removal sets ``s = 0``. What is left, ``y = p * x`` for a layer and ``y = x`` for a block, costs
nothing: the unit's value becomes its input's value, activations that no longer change anything go
with it, and the factors travel into linear layers (see scaling.py). The tree of modules is then
edited: a module that only passes its input on becomes an identity, and where a module's own forward
has to change (two branches in one block, a functional activation) that forward is rewritten.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from .convert import State, set_submodule, state_of
from .edits import apply_edits, digest, trace_forward
from .errors import PlanError, PruneError
from .fuse import fold_norm, fused_kernel
from .gates import BranchGate, Gate, Multiply, ResConv, gates, is_leaf
from .ops import NORMS, bounds, kind, weight_values
from .plan import Plan
from .scaling import Potentials
from .trace import Graph, Node, Ref, record, unwrap
from .units import find_blocks

__all__ = ["fold_norms", "leftovers", "operate", "prune"]

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


@dataclass
class _Surgery:
    graph: Graph
    same_as: dict[int, int] = field(default_factory=dict)  # value -> value that takes its place
    bypassed: dict[int, int] = field(default_factory=dict)  # node -> position of what it passes on
    multiply: dict[str, float] = field(default_factory=dict)  # gate path -> factor left over
    dead: set[int] = field(default_factory=set)
    potentials: Potentials = field(default_factory=Potentials)

    def resolve(self, value: int) -> int:
        while value in self.same_as:
            value = self.same_as[value]
        return value


def operate(model: nn.Module, remove: tuple[str, ...], *, fuse: bool) -> nn.Module:
    """Remove the named units and, with ``fuse``, turn every other gate into ordinary layers."""
    model = unwrap(model)
    state = state_of(model)
    model = copy.deepcopy(model)
    state = copy.copy(state)
    state.edits = list(state.edits)
    graph = record(model, state.example_inputs, leaf=is_leaf)
    todo = _Surgery(graph)
    _take_out(model, todo, remove)
    kept = _factors(model, todo, fuse)
    _absorb(model, todo, fuse)
    edits = _tree_edits(model, todo, remove)
    restore: dict[str, tuple[Tensor, Tensor | None]] = {}
    if fuse:
        for path, (weight, bias, like) in kept.items():
            original = _original_path(model, path)
            edits.append(_conv_edit(original, like, bias is not None))
            restore[original] = (weight, bias)
    model = _without_gates(model, everything=fuse, removed=remove)
    if not fuse:
        edits = [_gated_path(model, e) for e in edits]
    model = apply_edits(model, edits)
    with torch.no_grad():
        for path, (weight, bias) in restore.items():
            conv = model.get_submodule(path)
            conv.weight.copy_(weight.to(conv.weight))
            if bias is not None:
                conv.bias.copy_(bias.to(conv.bias))
    state.edits += [_original_edit(e) for e in edits]
    _label(model, state, fuse)
    return model


def _label(model: nn.Module, state: State, fuse: bool) -> None:
    if fuse:
        model.__dict__.pop("resconv_state", None)
        model.resconv_record = {"source": state.source, "edits": state.edits}  # type: ignore[assignment]
    else:
        model.resconv_state = state  # type: ignore[assignment]


def _take_out(model: nn.Module, todo: _Surgery, remove: tuple[str, ...]) -> None:
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


def _drop_activations(model: nn.Module, todo: _Surgery, every: dict[str, Gate]) -> None:
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


def _factors(
    model: nn.Module, todo: _Surgery, fuse: bool
) -> dict[str, tuple[Tensor, Tensor | None, nn.Module]]:
    """Tie the factors of all values, and return the kernels of the ResConvs that stay."""
    graph, ties = todo.graph, todo.potentials
    demands: list[tuple[Node, float]] = []
    for value in (*graph.inputs, *graph.outputs):
        ties.pin(value)
    uses = _param_uses(graph, todo.dead)
    for node in graph.nodes:
        if node.index in todo.dead:
            continue
        data = [v for v in node.inputs if not graph.values[v].constant]
        if node.index in todo.bypassed:
            if node.op == "gate":
                gate = node.call.module
                assert isinstance(gate, ResConv)
                assert gate.control is not None
                demands.append((node, gate.control.item()))
            else:
                ties.tie(node.outputs[0], node.inputs[todo.bypassed[node.index]])
        elif node.op == "gate":
            if isinstance(node.call.module, Multiply):
                parent = node.call.parent
                assert parent is not None
                assert isinstance(parent.module, BranchGate)
                if fuse:
                    demands.append((node, parent.module.scale.item()))
                else:
                    ties.tie(node.outputs[0], node.inputs[0])
            # ResConv and a gated BatchNorm absorb what stands on both sides.
        else:
            how = kind(graph, node)
            if how == "linear" and not _absorbs(graph, node, uses):
                how = "opaque"
            if how == "affine_out" and not _absorbs(graph, node, uses):
                how = "opaque"
            if how == "homogeneous":
                for v in (*data[1:], *node.outputs):
                    ties.tie(v, data[0])
            elif how == "product":
                first, second = _product(graph, node)
                ties.tie(node.outputs[0], first)
                ties.pin(second)
            elif how == "affine_out":
                ties.pin(data[0])
            elif how == "opaque":
                for v in (*data, *node.outputs):
                    ties.pin(v)
    for node, p in demands:
        # y = p * x, one value from now on: f(x) = p * f(y).
        x, y = node.inputs[0], node.outputs[0]
        if p > 0 and ties.tie(x, y, math.log(p)):
            continue
        ties.tie(x, y)
        if not math.isclose(p, 1.0, rel_tol=1e-12):
            path = node.call.path
            if isinstance(node.call.module, Multiply):
                assert node.call.parent is not None
                path = node.call.parent.path
            # What is left over is the factor between the ties as they are.
            todo.multiply[path] = p
            todo.bypassed.pop(node.index, None)
            todo.same_as.pop(y, None)
    for node, p in demands:
        path = (
            node.call.path
            if not isinstance(node.call.module, Multiply)
            else (node.call.parent.path if node.call.parent else "")
        )
        if path in todo.multiply:
            x, y = node.inputs[0], node.outputs[0]
            todo.multiply[path] = p * ties.factor(y) / ties.factor(x)
    kept: dict[str, tuple[Tensor, Tensor | None, nn.Module]] = {}
    if fuse:
        for node in graph.nodes:
            gate = node.call.module
            if node.op != "gate" or not isinstance(gate, ResConv) or node.index in todo.bypassed:
                continue
            path = node.call.path
            if node.index in todo.dead or path in kept or path in todo.multiply:
                continue
            f_in, f_out = ties.factor(node.inputs[0]), ties.factor(node.outputs[0])
            weight, bias = fused_kernel(_in_eval(gate))
            kept[path] = (
                weight * (f_out / f_in),
                None if bias is None else bias * f_out,
                gate.conv,
            )
    return kept


def _in_eval(gate: ResConv) -> ResConv:
    # The surgery is defined on the eval-mode function, whatever mode the copy stands in.
    if gate.norm is not None:
        gate.norm.eval()
    return gate


def _product(graph: Graph, node: Node) -> tuple[int, int]:
    """Return which factor of a product carries the stream: the larger one, else the first."""
    a, b = (arg.value for arg in node.args[:2])
    size = [math.prod(graph.values[v].shape) for v in (a, b)]
    return (b, a) if size[1] > size[0] else (a, b)


def _param_of(graph: Graph, value: int) -> tuple[str, bool] | None:
    """Return the parameter behind a constant value, seen through views, and whether it is one."""
    while graph.values[value].param is None:
        node = graph.producer(value)
        if node is None or len(node.inputs) != 1 or kind_of_view(node) is False:
            return None
        value = node.inputs[0]
    name = graph.values[value].param
    assert name is not None
    return name, True


def kind_of_view(node: Node) -> bool:
    return node.op in (
        "view",
        "t",
        "transpose",
        "unsqueeze",
        "permute",
        "reshape",
        "_to_copy",
        "expand",
        "clone",
        "detach",
        "squeeze",
        "alias",
        "_reshape_alias",
    )


def _param_uses(graph: Graph, dead: set[int]) -> dict[str, int]:
    uses: dict[str, int] = {}
    for node in graph.nodes:
        if node.index in dead or all(graph.values[v].constant for v in node.outputs):
            continue
        for v in node.inputs:
            if graph.values[v].constant:
                for name in set(_behind(graph, v)):
                    uses[name] = uses.get(name, 0) + 1
    return uses


def _behind(graph: Graph, value: int) -> list[str]:
    if graph.values[value].param is not None:
        return [graph.values[value].param]  # type: ignore[list-item]
    node = graph.producer(value)
    return [] if node is None else [n for v in node.inputs for n in _behind(graph, v)]


def _linear_params(graph: Graph, node: Node) -> tuple[str | None, str | None, bool]:
    """Return weight and bias names of an absorbing node, and whether all of them are known."""
    if node.op in ("mul", "mul_"):
        constant = next((v for v in node.inputs if graph.values[v].constant), None)
        found = None if constant is None else _param_of(graph, constant)
        return (found[0], None, True) if found else (None, None, False)
    if node.op in ("native_layer_norm", "native_group_norm"):
        start = 2 if node.op == "native_layer_norm" else 1
        refs = [a.value if isinstance(a, Ref) else None for a in node.args[start : start + 2]]
        weight, bias = refs
    else:
        weight, bias = weight_values(node)
    names: list[str | None] = []
    for value in (weight, bias):
        found = None if value is None else _param_of(graph, value)
        if value is not None and found is None:
            return None, None, False
        names.append(found[0] if found else None)
    return names[0], names[1], names[0] is not None


def _absorbs(graph: Graph, node: Node, uses: dict[str, int]) -> bool:
    weight, bias, known = _linear_params(graph, node)
    if not known:
        return False
    names = [weight, bias]
    if node.op in NORMS:
        mean = node.args[3]
        found = _param_of(graph, mean.value) if isinstance(mean, Ref) else None
        if found is None:
            return False
        names.append(found[0])
    return all(uses.get(n, 0) == 1 for n in names if n is not None)


def _absorb(model: nn.Module, todo: _Surgery, fuse: bool) -> None:
    """Multiply the factors into the weights of the copy."""
    graph, ties = todo.graph, todo.potentials
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    uses = _param_uses(graph, todo.dead)
    done: set[str] = set()

    def scale(name: str | None, factor: float) -> None:
        if name is not None and factor != 1.0:
            tensor = tensors[name]
            tensor.copy_((tensor.double() * factor).to(tensor.dtype))

    with torch.no_grad():
        for node in graph.nodes:
            if node.index in todo.dead or not node.outputs:
                continue
            f_out = ties.factor(node.outputs[0])
            if node.op == "gate":
                gate = node.call.module
                path = node.call.path
                if node.index in todo.bypassed or path in done or path in todo.multiply:
                    continue
                f_in = ties.factor(node.inputs[0])
                if isinstance(gate, ResConv) and not fuse:
                    done.add(path)
                    scale(f"{path}.conv.weight", 1 / f_in)
                    scale(f"{path}.scale", f_out)
                    scale(f"{path}.control", f_out / f_in)
                    if gate.norm is None and gate.conv.bias is not None:
                        pass  # y = s * (W x + b): b is in the scale's part and unchanged
                elif isinstance(gate, BranchGate):
                    done.add(path)
                    _absorb_gated_norm(gate, f_in, f_out, fuse)
                continue
            how = kind(graph, node)
            if how not in ("linear", "affine_out") and node.op not in ("mul", "mul_"):
                continue
            if node.index in todo.bypassed or how not in ("linear", "affine_out"):
                continue
            if not _absorbs(graph, node, uses):
                continue
            data = next(v for v in node.inputs if not graph.values[v].constant)
            f_in = ties.factor(data)
            weight, bias, _ = _linear_params(graph, node)
            if node.op in NORMS and f_in != 1.0:
                mean = _param_of(graph, node.args[3].value)
                assert mean is not None
                scale(mean[0], f_in)
            scale(weight, f_out / f_in)
            scale(bias, f_out)


def _absorb_gated_norm(gate: BranchGate, f_in: float, f_out: float, fuse: bool) -> None:
    norm = gate.module
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    s = gate.scale.item() if fuse else 1.0
    if norm.running_mean is not None:
        norm.running_mean.mul_(f_in)
    if norm.weight is not None:
        norm.weight.mul_(s * f_out / f_in)
        norm.bias.mul_(s * f_out)
    elif norm.running_var is not None:
        # No affine of its own: give it one.
        norm.affine = True
        like = norm.running_var
        norm.weight = nn.Parameter(torch.full_like(like, s * f_out / f_in))
        norm.bias = nn.Parameter(torch.zeros_like(like))


def _original_path(model: nn.Module, path: str) -> str:
    """Return the path without the steps that gates added."""
    parts, kept, module = path.split(".") if path else [], [], model
    for part in parts:
        if not (isinstance(module, BranchGate) and part == "module"):
            kept.append(part)
        module = getattr(module, part)
    return ".".join(kept)


def _conv_edit(path: str, conv: nn.Module, bias: bool) -> dict[str, Any]:
    kinds = {nn.Conv1d: "Conv1d", nn.Conv2d: "Conv2d", nn.Conv3d: "Conv3d"}
    name = next(n for k, n in kinds.items() if isinstance(conv, k))
    args = {
        key: list(value) if isinstance(value := getattr(conv, key), tuple) else value
        for key in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
    }
    return {"op": "conv", "path": path, "type": name, "args": {**args, "bias": bias}}


def _tree_edits(model: nn.Module, todo: _Surgery, remove: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the edits of the module tree that carry out what the values say."""
    graph = todo.graph
    times: dict[str, int] = {}
    for call in graph.calls:
        times[call.path] = times.get(call.path, 0) + 1
    names: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        names[id(module)] = names.get(id(module), 0) + 1
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
        if times[call.path] > 1 or names[id(module)] > 1 or _has_hooks(module):
            continue
        identities.append(call.path)
        covered.update(range(call.start, call.end))
    edits = [{"op": "identity", "path": _original_path(model, p)} for p in identities]
    edits += [
        {"op": "multiply", "path": _original_path(model, p), "factor": factor}
        for p, factor in todo.multiply.items()
        if isinstance(model.get_submodule(p), ResConv)
    ]
    branch = [p for p in todo.multiply if isinstance(model.get_submodule(p), BranchGate)]
    if branch:
        edits += [
            {"op": "append", "path": _original_path(model, p), "factor": todo.multiply[p]}
            for p in branch
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
    rewritten = []
    for path, indices in rest.items():
        rewrite = _rewrite(model, todo, path, sorted(indices))
        if rewrite is not None:
            rewritten.append(rewrite)
    # Inner forwards first, so that an outer rewrite holds the rewritten inner one.
    rewritten.sort(key=lambda e: -e["path"].count("."))
    return edits + rewritten


def _whole(graph: Graph, call: Any, index: int) -> bool:
    """Whether the call does nothing but this one operation."""
    nodes = [n for n in graph.nodes[call.start : call.end] if n.op != "empty"]
    return len(nodes) == 1 and nodes[0].index == index


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _rewrite(
    model: nn.Module, todo: _Surgery, path: str, indices: list[int]
) -> dict[str, Any] | None:
    """Return the edit that passes the operations by in the forward of the module at ``path``.

    Activations that stay because their forward cannot be rewritten only cost time; a unit that
    stays would be wrong, so that is refused.
    """
    graph = todo.graph
    module = model.get_submodule(path)
    calls = graph.calls_of(path)
    must = [i for i in indices if graph.nodes[i].op in ("add", "add_", "gate")]

    def refuse(why: str) -> None:
        if must:
            raise PruneError(
                f"The forward of {path or type(model).__name__} ({type(module).__name__}) has to "
                f"be rewritten to remove a unit from it, and cannot be: {why}."
            )

    if len(calls) != 1:
        return refuse(f"it is called {len(calls)} times in one pass")
    if _has_hooks(module):
        return refuse("it carries hooks")
    call = calls[0]
    signature: dict[str, Any] = {}
    try:
        import inspect

        bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
        signature = dict(bound.arguments)
        given = set(signature)
        bound.apply_defaults()
        signature = dict(bound.arguments)
        constants = {k: v for k, v in signature.items() if not _has_ref(v)}
        bad = {
            k: v
            for k, v in constants.items()
            if not isinstance(v, bool | int | float | str | type(None))
            and (k in given or v not in ((), {}))
        }
        nested = {k for k, v in signature.items() if _has_ref(v) and not isinstance(v, Ref)}
        if bad or nested:
            return refuse(f"its argument {next(iter(bad or nested))!r} is no plain value")
        constants = {k: v for k, v in constants.items() if v not in ((), {}) or v is None}
        gm, tags = _tagged(graph, module, signature, constants)
    except Exception as error:
        return refuse(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    mine = graph.nodes[call.start : call.end]
    if [n.op for n in mine] != [op for op, _ in tags]:
        return refuse("it does other things when it is traced")
    nodes = []
    for index in indices:
        name = tags[index - call.start][1]
        if name is None:
            return refuse("an operation has no name in the trace")
        nodes.append([name, todo.bypassed[index]])
    return {
        "op": "bypass",
        "path": _original_path(model, path),
        "constants": constants,
        "nodes": nodes,
        "code": digest(gm.graph),
    }


def _has_ref(tree: Any) -> bool:
    if isinstance(tree, Ref):
        return True
    if isinstance(tree, list | tuple):
        return any(_has_ref(t) for t in tree)
    return isinstance(tree, dict) and any(_has_ref(t) for t in tree.values())


class _Tagging(fx.Interpreter):
    current: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n.name
        return super().run_node(n)


def _tagged(
    graph: Graph, module: nn.Module, signature: dict[str, Any], constants: dict[str, Any]
) -> tuple[fx.GraphModule, list[tuple[str, str | None]]]:
    """Trace the module's own forward, and say which traced node ran each recorded operation."""
    gm = fx.GraphModule(module, trace_forward(module, constants))
    names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]

    def fill(ref: Any) -> Any:
        if not isinstance(ref, Ref):
            return ref
        value = graph.values[ref.value]
        if value.dtype.is_floating_point:
            return torch.rand(value.shape, dtype=value.dtype)
        return torch.zeros(value.shape, dtype=value.dtype)

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    ordered = [tree_map(fill, signature[n]) for n in signature]
    ordered = [t.to(device) if isinstance(t, Tensor) else t for t in ordered]
    if len(names) != len(ordered):
        ordered = [t for t, n in zip(ordered, signature, strict=True) if n not in constants]
    interpreter = _Tagging(gm)

    class Runner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gm = gm

        def forward(self, *args: Any) -> Any:
            return interpreter.run(*args)

    seen = record(Runner(), tuple(ordered), leaf=is_leaf, tag=lambda: interpreter.current)
    return gm, [(n.op, n.tag) for n in seen.nodes]


def _without_gates(model: nn.Module, *, everything: bool, removed: tuple[str, ...]) -> nn.Module:
    """Put the layers that gates hold back in their places (in place)."""
    for path, module in list(model.named_modules())[::-1]:
        if not isinstance(module, Gate) or not (everything or module.unit in removed):
            continue
        set_submodule(model, path, module.module if isinstance(module, BranchGate) else module.conv)
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
    return {**edit, "path": ".".join(path), "_original": edit["path"]}


def _original_edit(edit: dict[str, Any]) -> dict[str, Any]:
    edit = dict(edit)
    edit["path"] = edit.pop("_original", edit["path"])
    return edit


def leftovers(compact: nn.Module) -> dict[str, float]:
    """Return the factors that no layer could absorb, by the path of the multiply."""
    edits = (getattr(compact, "resconv_record", None) or {}).get("edits", [])
    return {e["path"]: e["factor"] for e in edits if e["op"] in ("multiply", "append")}


def fold_norms(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a copy with every BatchNorm that alone reads a conv folded into that conv."""
    from .units import _norm_after, owner_of, why_untouchable

    model = copy.deepcopy(unwrap(model))
    graph = record(model, example_inputs)
    edits, kernels = [], {}
    for node in graph.nodes:
        if node.op != "convolution" or node.args[6] or not isinstance(node.args[1], Ref):
            continue
        param = graph.values[node.args[1].value].param
        if param is None:
            continue
        path = owner_of(param)
        conv = model.get_submodule(path)
        if type(conv) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            continue
        if why_untouchable(model, graph, path) is not None:
            continue
        norm, children, _ = _norm_after(model, graph, node)
        if norm is None:
            continue
        bn = model.get_submodule(norm)
        modes = bn.training
        bn.eval()
        kernels[path] = fold_norm(conv.weight, conv.bias, bn)
        bn.train(modes)
        edits.append(_conv_edit(path, conv, True))
        edits.append({"op": "children", "path": norm, "names": list(children)})
    model = apply_edits(model, edits)
    with torch.no_grad():
        for path, (weight, bias) in kernels.items():
            conv = model.get_submodule(path)
            conv.weight.copy_(weight.to(conv.weight))
            conv.bias.copy_(bias.to(conv.bias))
    before = getattr(model, "resconv_record", None)
    source = getattr(model, "resconv_source", None)
    model.resconv_record = {  # type: ignore[assignment]
        "source": (before or {}).get("source") or source,
        "edits": [*((before or {}).get("edits") or []), *edits],
    }
    return model
