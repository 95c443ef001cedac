"""Conv layers that an identity can stand beside, found in a record; the others carry the reason.

A conv that keeps its input's shape is removable: with ``s = 0`` the identity is left. One that changes it
may have a shortcut of its own while training (``reach``), and stays.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from ..nn.gates import ResConv
from ..nn.geometry import Reach, padding_before, tap
from .candidates import Candidate, Unit, owner_of, why_untouchable
from .graph import Graph, Node, Ref
from .ops import NORMS

__all__ = [
    "find_layers",
    "norm_after",
    "reach",
]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_layers(model: nn.Module, graph: Graph) -> list[Candidate]:
    """Return a candidate for every conv layer of the recorded model."""
    found: dict[str, Candidate] = {}
    shared = _shared_params(model)
    for node in graph.nodes:
        if node.op == "gate":
            path = node.call.path
            if isinstance(node.call.module, ResConv):
                layer = node.call.module
                size = _num_params(layer)
                unit = Unit(
                    layer.unit or path, "layer", node.macs, size, layer.removable, layer.reason
                )
                found[path] = Candidate(unit, conv=path, nodes=frozenset({node.index}))
            continue
        if node.op != "convolution":
            continue
        candidate = _layer(model, graph, node, shared)
        if candidate is not None and candidate.conv not in found:
            found[candidate.conv] = candidate
    return list(found.values())


def _layer(model: nn.Module, graph: Graph, node: Node, shared: set[str]) -> Candidate | None:
    weight = node.args[1]
    if not isinstance(weight, Ref):
        return None
    param = graph.values[weight.value].param
    path = owner_of(param) if param is not None else node.call.path
    num_params = _num_params(model.get_submodule(path))
    reason = _why_kept(model, graph, node, path, param, shared)
    base = Unit(path, "layer", node.macs, num_params, reason is None, reason)
    tail = None if reason is None else reach(model, graph, node, path, reason)
    if reason is not None and tail is None:
        return Candidate(base, conv=path, nodes=frozenset({node.index}))
    norm, children, norm_nodes = norm_after(model, graph, node)
    if norm is not None and _sets_its_own_mode(model.get_submodule(norm)):
        norm, children, norm_nodes = None, (), ()
    if norm is not None:
        base = replace(base, num_params=num_params + _num_params(model.get_submodule(norm)))
    nodes = frozenset({node.index, *norm_nodes})
    return Candidate(base, conv=path, norm=norm, norm_children=children, reach=tail, nodes=nodes)


def _why_kept(
    model: nn.Module, graph: Graph, node: Node, path: str, param: str | None, shared: set[str]
) -> str | None:
    """Return the reason why no identity can stand beside this conv, or None."""
    if param is None:
        return f"the kernel of {path or 'the model'} is computed in its forward, not a parameter"
    module = model.get_submodule(path)
    if node.args[6]:
        return f"{path} is a transposed convolution"
    if not isinstance(module, _CONVS):
        return f"{path} is a {type(module).__name__}, not a convolution module"
    stride, padding, dilation = (tuple(node.args[i]) for i in (3, 4, 5))
    if (reason := why_untouchable(model, graph, path)) is not None:
        return reason
    if param in shared:
        return f"the kernel of {path} is shared with another layer"
    call = graph.calls_of(path)[0]
    for value in node.inputs[1:]:
        other = next((u for u in graph.users.get(value, []) if not call.holds(u)), None)
        if other is not None:
            return (
                f"{graph.values[value].param} is read by other code, too ({other.op} in "
                f"{other.call.path or 'the forward'})"
            )
    own = [n for n in graph.nodes[call.start : call.end] if n.op != "empty"]
    if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], Ref):
        return f"{path} is called with more than one argument"
    # torch's own classes pad in their forward (padding_mode), and do nothing else.
    if len([n for n in own if n.op == "convolution"]) != 1:
        return f"{path} does more than one convolution in its forward"
    if type(module) not in _CONVS and len(own) != 1:
        return f"{path} is a {type(module).__name__}, which prepares its input or kernel itself"
    x, y = call.args[0].value, node.outputs[0]
    shape_in, shape_out = graph.values[x].shape, graph.values[y].shape
    if any(s != 1 for s in stride):
        return _Reshapes(f"stride {_short(stride)} changes the size")
    if shape_in[1] != shape_out[1]:
        return _Reshapes(f"{shape_in[1]} channels in, {shape_out[1]} out")
    if shape_in != shape_out:
        return _Reshapes(f"size {_short(shape_in[2:])} in, {_short(shape_out[2:])} out")
    if type(module) in _CONVS and tap(module) is None:
        kernel = tuple(graph.values[node.inputs[1]].shape[2:])
        return (
            f"no kernel tap reads the output's own position (kernel {_short(kernel)}, "
            f"padding {_short(padding)}, dilation {_short(dilation)})"
        )
    if y in graph.outputs and x in graph.inputs:
        return "it is the whole model"
    return None


class _Reshapes(str):
    """A reason that leaves room for a shortcut of another shape."""

    __slots__ = ()


def reach(model: nn.Module, graph: Graph, node: Node, path: str, reason: str) -> Reach | None:
    """Return the shortcut that a shape-changing conv may have, or None where none is fusible.

    It reads the middle tap of the kernel, and must never read the padding.
    """
    if not isinstance(reason, _Reshapes):
        return None
    conv: Any = model.get_submodule(path)
    shape_in = graph.values[graph.calls_of(path)[0].args[0].value].shape[2:]
    shape_out = graph.values[node.outputs[0]].shape[2:]
    taps, offsets = [], []
    for i, (kernel, dilation, stride) in enumerate(
        zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
    ):
        middle = (kernel - 1) // 2
        offset = middle * dilation - padding_before(conv, i)
        if offset < 0 or offset + stride * (shape_out[i] - 1) >= shape_in[i]:
            return None
        taps.append(middle)
        offsets.append(offset)
    return Reach(tuple(taps), tuple(offsets))


def norm_after(
    model: nn.Module, graph: Graph, conv: Node
) -> tuple[str | None, tuple[str, ...], tuple[int, ...]]:
    """Return the BatchNorm that alone reads the conv, and the layers its module runs after it."""
    out = conv.outputs[0]
    readers = graph.users.get(out, [])
    nothing: tuple[None, tuple[str, ...], tuple[int, ...]] = (None, (), ())
    if out in graph.outputs or len(readers) != 1 or readers[0].op not in NORMS:
        return nothing
    node = readers[0]
    call = node.call
    module = call.module
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
        return nothing
    if node.args[0] != Ref(out) or call.args != (Ref(out),) or call.kwargs:
        return nothing
    if why_untouchable(model, graph, call.path) is not None or isinstance(module, nn.SyncBatchNorm):
        return nothing
    affine = [n for n in (module.weight, module.bias) if n is None]
    if len(affine) == 1:
        return nothing
    # What the module does besides (timm's BatchNormAct2d) must be calls of its own children in a row.
    children: list[str] = []
    current = node.outputs[0]
    inner = [c for c in graph.calls if c.parent is call]
    for child in inner:
        if child.args != (Ref(current),) or child.kwargs or not isinstance(child.output, Ref):
            return nothing
        name = child.path.removeprefix(call.path + ".")
        if "." in name:
            return nothing
        children.append(name)
        current = child.output.value
    if call.output != Ref(current):
        return nothing
    own = [
        n
        for n in graph.nodes[call.start : call.end]
        if n is not node and n.op != "empty" and not any(c.holds(n) for c in inner)
    ]
    return nothing if own else (call.path, tuple(children), (node.index,))


def _sets_its_own_mode(norm: nn.Module) -> bool:
    """Whether a norm of a class of its own decides what ``train()`` does to it: it may be frozen."""
    own = type(norm).train is not nn.Module.train or "train" in vars(norm)
    return own and type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _shared_params(model: nn.Module) -> set[str]:
    """Return the names of parameters that several modules hold.

    A module that is registered under several names is one module.
    """
    seen: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, param in module.named_parameters(path, recurse=False):
            seen.setdefault(id(param), []).append(name)
    return {name for names in seen.values() if len(names) > 1 for name in names}


def _num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _short(numbers: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in numbers) if len(set(numbers)) > 1 else str(numbers[0])
