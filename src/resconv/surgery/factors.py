"""Factors that removed layers leave behind, multiplied into the linear layers that can take them."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from ..analysis.candidates import params_behind
from ..analysis.graph import Graph, Node, Ref, data_of
from ..analysis.ops import NORMS, kind, weight_values
from ..nn.algebra import fused_kernel
from ..nn.gates import Blend, BranchGate, Multiply, ResConv, Soften
from .concat import Slices, by_input
from .decisions import MustStayError, Surgery

__all__ = ["Kernel", "absorb", "kernels_of", "tie_factors"]

Kernel = tuple[Tensor, Tensor | None, nn.Module]  # weight, bias, and the conv they stand for


def tie_factors(todo: Surgery, fuse: bool) -> None:
    """Tie the factors of all values; what cannot be absorbed is left in ``todo.multiply``.

    Raises:
        MustStayError: an operation was to be passed by whose factor nothing can absorb.
    """
    graph, ties = todo.graph, todo.potentials
    demands: list[tuple[Node, int, float]] = []
    for value in (*graph.inputs, *graph.outputs, *todo.pinned):
        ties.pin(value)
    uses, all_data = _param_uses(graph, todo.dead), graph.table(data_of)
    slices = todo.slices = Slices(graph, ties)
    for node in graph.nodes:
        if node.index in todo.dead:
            continue
        data = all_data[node.index]
        if slices.visit(node, absorbs=partial(_takes_slices, todo, node, uses, fuse)):
            continue
        if node.index in todo.bypassed:
            read = node.inputs[todo.bypassed[node.index]]
            if node.index in todo.factors:
                demands.append((node, read, todo.factors[node.index]))
            else:
                ties.tie(node.outputs[0], read)
        elif node.op == "gate":
            if isinstance(node.call.module, Soften):
                for v in (*node.inputs, *node.outputs):
                    ties.pin(v)
            elif isinstance(node.call.module, Blend):
                for v in node.inputs:
                    ties.tie(v, node.outputs[0])
            elif isinstance(node.call.module, Multiply):
                parent = node.call.parent
                assert parent is not None
                assert isinstance(parent.module, BranchGate)
                if fuse:
                    demands.append((node, node.inputs[0], parent.module.scale.item()))
            # ResConv, a gated BatchNorm and a scale that stays absorb what stands on both sides.
        else:
            _tie_kind(todo, node, data, uses)
    for value in graph.outputs:
        slices.collapse(value)
    _meet(todo, demands)


def _tie_kind(todo: Surgery, node: Node, data: list[int], uses: dict[str, int]) -> None:
    """Tie what an operation reads and returns, by how it deals with a factor."""
    graph, ties = todo.graph, todo.potentials
    how = kind(graph, node)
    if how in ("linear", "affine_out") and not _absorbs(graph, node, uses):
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


def _meet(todo: Surgery, demands: list[tuple[Node, int, float]]) -> None:
    """Let ``y = p * x`` be one value for each of the demands ``(node, x, p)``; see :func:`tie_factors`."""
    ties = todo.potentials
    left: list[tuple[Node, int, float]] = []
    for node, x, p in demands:
        # y = p * x, one value from now on: f(x) = p * f(y).
        y = node.outputs[0]
        if p > 0 and ties.tie(x, y, math.log(p)):
            continue
        ties.tie(x, y)
        if node.op != "gate":
            raise MustStayError({node.index})
        left.append((node, x, p))
        todo.multiply[_place(node)] = p
        todo.bypassed.pop(node.index, None)
        todo.same_as.pop(y, None)
    for node, x, p in left:
        # What is left over is the factor between the ties as they are.
        todo.multiply[_place(node)] = p * ties.factor(node.outputs[0]) / ties.factor(x)


def kernels_of(todo: Surgery) -> dict[str, Kernel]:
    """Return the fused kernels of the ResConvs that stay, with the factors of both sides in them."""
    graph, ties, slices = todo.graph, todo.potentials, todo.slices
    assert slices is not None
    kept: dict[str, Kernel] = {}
    for node in graph.nodes:
        gate = node.call.module
        if node.op != "gate" or not isinstance(gate, ResConv) or node.index in todo.bypassed:
            continue
        path = node.call.path
        if node.index in todo.dead or path in kept or path in todo.multiply:
            continue
        weight, bias = fused_kernel(_in_eval(gate))
        assert isinstance(gate.conv.groups, int)
        f_in = by_input(slices.factors(node.inputs[0]), weight, gate.conv.groups)
        f_out = ties.factor(node.outputs[0])
        kept[path] = (
            weight * (f_out / f_in),
            None if bias is None else bias * f_out,
            gate.conv,
        )
    return kept


def _takes_slices(todo: Surgery, node: Node, uses: dict[str, int], fuse: bool) -> bool:
    """Whether one factor per channel of the input can go into the operation's weights."""
    if node.index in todo.bypassed:
        return False
    if node.op == "gate":
        return fuse and isinstance(node.call.module, ResConv)
    return kind(todo.graph, node) == "linear" and _absorbs(todo.graph, node, uses)


def _place(gate: Node) -> str:
    """Return the path of the gate whose factor the node multiplies with."""
    if isinstance(gate.call.module, Multiply):
        assert gate.call.parent is not None
        return gate.call.parent.path
    return gate.call.path


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


_VIEWS = {
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
}


def _param_of(graph: Graph, value: int) -> str | None:
    """Return the parameter that a constant value is, seen through views, or None."""
    while graph.values[value].param is None:
        node = graph.producer(value)
        if node is None or len(node.inputs) != 1 or node.op not in _VIEWS:
            return None
        value = node.inputs[0]
    return graph.values[value].param


def _param_uses(graph: Graph, dead: set[int]) -> dict[str, int]:
    uses: dict[str, int] = {}
    for index, names in enumerate(graph.table(_params_read)):
        if index not in dead:
            for name in names:
                uses[name] = uses.get(name, 0) + 1
    return uses


def _params_read(graph: Graph, node: Node) -> list[str]:
    """Return the parameters that the node reads, each as often as it does."""
    values = graph.values
    if all(values[v].constant for v in node.outputs):
        return []
    return [
        name for v in node.inputs if values[v].constant for name in set(params_behind(graph, v))
    ]


def _linear_params(graph: Graph, node: Node) -> tuple[str | None, str | None, bool]:
    """Return weight and bias names of an absorbing node, and whether all of them are known."""
    if node.op in ("mul", "mul_"):
        constant = next((v for v in node.inputs if graph.values[v].constant), None)
        found = None if constant is None else _param_of(graph, constant)
        return found, None, found is not None
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
        names.append(found)
    return names[0], names[1], names[0] is not None


def _absorbs(graph: Graph, node: Node, uses: dict[str, int]) -> bool:
    names = graph.table(_absorbing_params)[node.index]
    return names is not None and all(uses.get(n, 0) == 1 and n not in graph.written for n in names)


def _absorbing_params(graph: Graph, node: Node) -> list[str] | None:
    """Return the parameters that a factor of the node goes into; None where they are not known."""
    if kind(graph, node) not in ("linear", "affine_out"):
        return None
    weight, bias, known = _linear_params(graph, node)
    if not known:
        return None
    names = [weight, bias]
    if node.op in NORMS:
        mean = node.args[3]
        found = _param_of(graph, mean.value) if isinstance(mean, Ref) else None
        if found is None:
            return None
        names.append(found)
    return [n for n in names if n is not None]


def absorb(model: nn.Module, todo: Surgery, fuse: bool) -> None:
    """Multiply the factors into the weights of the copy."""
    graph, ties = todo.graph, todo.potentials
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    uses = _param_uses(graph, todo.dead)
    done: set[str] = set()

    def scale(name: str | None, factor: float | Tensor) -> None:
        if name is not None and (isinstance(factor, Tensor) or factor != 1.0):
            tensor = tensors[name]
            tensor.copy_((tensor.double() * factor).to(tensor.dtype))

    with torch.no_grad():
        for node in graph.nodes:
            if node.index in todo.dead or not node.outputs:
                continue
            # A row of slices is made by a concatenation, which absorbs nothing.
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
                elif isinstance(gate, Multiply):
                    if not fuse and f_out != f_in:
                        gate_of = _place(node)
                        scale(f"{gate_of}.scale", f_out / f_in)
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
            assert todo.slices is not None
            taken = todo.slices.factors(data)
            weight, bias, _ = _linear_params(graph, node)
            assert weight is not None
            if node.op in NORMS:
                mean = _param_of(graph, node.args[3].value)
                assert mean is not None
                taken = taken.to(tensors[mean].device) if isinstance(taken, Tensor) else taken
                scale(mean, taken)
            elif node.op == "convolution" and not node.args[6]:
                taken = by_input(taken, tensors[weight], node.args[8])
            scale(weight, f_out / taken)
            scale(bias, f_out)


def _absorb_gated_norm(gate: BranchGate, f_in: float, f_out: float, fuse: bool) -> None:
    norm = gate.module
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    s = gate.scale.item() if fuse else 1.0
    if norm.running_mean is not None:
        norm.running_mean.mul_(f_in)
    norm.weight.mul_(s * f_out / f_in)
    norm.bias.mul_(s * f_out)
