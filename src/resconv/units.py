"""Candidates for removal, found in a record: conv layers and residual branches.

A *layer* unit is a conv that keeps its input's shape, so an identity can stand beside it. A *block*
unit is an addition ``v + F(v)``: everything between ``v`` and the addition depends on ``v`` alone and
is read by nobody else, so without it the addition is the identity. Nothing here looks at the class
of a block. Whatever is not removable carries the reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .gates import BranchGate, Reach, ResConv, is_leaf, is_plain_norm
from .ops import NORMS, is_identity, kind
from .trace import Call, Graph, Node, Ref, batch_size, record, unwrap

__all__ = [
    "Candidate",
    "Unit",
    "find_blocks",
    "find_layers",
    "norm_after",
    "owner_of",
    "params_behind",
    "reach",
    "tap",
    "units",
    "why_untouchable",
]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Unit:
    """A conv layer or a residual branch.

    ``macs`` (at batch size 1) and ``num_params`` are what leaves with it. ``reason`` says why it
    stays, and is None for a removable unit.
    """

    name: str
    kind: str
    macs: int
    num_params: int
    removable: bool
    reason: str | None = None


@dataclass
class Candidate:
    """A unit with what the surgery needs to know about it."""

    unit: Unit
    conv: str = ""
    norm: str | None = None
    norm_children: tuple[str, ...] = ()
    reach: Reach | None = None  # of a conv that stays, but may have a shortcut while training
    gate: str = ""
    add: int = -1
    value: int = -1
    nodes: frozenset[int] = field(default_factory=frozenset)


def units(model: nn.Module, example_inputs: Any) -> list[Unit]:
    """List every conv layer and residual branch, with its cost and, where it stays, the reason.

    The model is run once in eval mode and left as it was.

    Raises:
        TraceError: the model does not run on ``example_inputs``.
    """
    model = unwrap(model)
    graph = record(model, example_inputs, leaf=is_leaf)
    every = [*find_layers(model, graph), *find_blocks(model, graph)]
    batch = batch_size(example_inputs)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    every.sort(key=lambda c: order.get(c.conv or c.gate, 0))
    return [replace(c.unit, macs=c.unit.macs // batch) for c in every]


def owner_of(param: str) -> str:
    return param.rpartition(".")[0]


def why_untouchable(model: nn.Module, graph: Graph, path: str) -> str | None:
    """Return why the module at ``path`` cannot be replaced by another, or None."""
    module = model.get_submodule(path)
    calls = graph.calls_of(path)
    paths = graph.places(model, module)
    if not calls:
        return f"{path} is never called as a module (its parameters are used by other code)"
    if len(calls) > 1:
        return f"{path} is called {len(calls)} times in one forward pass"
    if len(paths) > 1:
        return f"the same module stands at {len(paths)} places: {', '.join(paths[:3])}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return f"{path} carries a hook, which would be lost"
    parametrized = getattr(module, "parametrizations", None)
    if isinstance(parametrized, nn.ModuleDict):
        return f"{path} is parametrised ({', '.join(parametrized)})"
    return None


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
    if norm is not None:
        base = replace(base, num_params=num_params + _num_params(model.get_submodule(norm)))
    nodes = frozenset({node.index, *norm_nodes})
    return Candidate(base, conv=path, norm=norm, norm_children=children, reach=tail, nodes=nodes)


def _why_kept(
    model: nn.Module, graph: Graph, node: Node, path: str, param: str | None, shared: set[str]
) -> str | None:
    """Return the reason why no identity can stand beside this conv, or None."""
    if param is None:
        return f"the kernel of {path} is computed in its forward, not a parameter"
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
        offset = middle * dilation - _padding_before(conv, i)
        if offset < 0 or offset + stride * (shape_out[i] - 1) >= shape_in[i]:
            return None
        taps.append(middle)
        offsets.append(offset)
    return Reach(tuple(taps), tuple(offsets))


def _padding_before(conv: Any, dim: int) -> int:
    if conv.padding == "valid":
        return 0
    if conv.padding == "same":
        # torch puts the odd element behind.
        return int(conv.dilation[dim] * (conv.kernel_size[dim] - 1) // 2)
    return int(conv.padding[dim])


def tap(conv: nn.Module) -> tuple[int, ...] | None:
    """Return the kernel index that reads the output's own position, or None (see method)."""
    found = []
    for i, (kernel, dilation) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):  # type: ignore[arg-type]
        before = _padding_before(conv, i)
        if before % dilation or before // dilation >= kernel:
            return None
        found.append(before // dilation)
    return tuple(found)


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


def find_blocks(model: nn.Module, graph: Graph) -> list[Candidate]:
    """Return a candidate for every residual addition of the recorded model."""
    found = []
    for node in graph.nodes:
        if node.op not in ("add", "add_") or node.kwargs.get("alpha", 1) != 1:
            continue
        if len(node.args) < 2 or not all(isinstance(a, Ref) for a in node.args[:2]):
            continue
        for short, branch in ((0, 1), (1, 0)):
            v, w = node.args[short].value, node.args[branch].value
            region = branch_region(graph, v, w)
            if region is not None:
                found.append(_block(model, graph, node, v, w, region))
                break
    return _with_names(found, graph)


def source(graph: Graph, value: int) -> int:
    """Follow copies back to the value they copy."""
    while (node := graph.producer(value)) is not None and is_identity(node):
        value = node.inputs[0]
    return value


def branch_region(graph: Graph, v: int, w: int) -> list[Node] | None:
    """Return the nodes between ``v`` and ``w`` when ``w`` is computed from ``v`` alone."""
    v = source(graph, v)
    if graph.values[v].constant or graph.values[v].shape != graph.values[w].shape:
        return None
    first = graph.values[v].producer
    first = -1 if first is None else first
    nodes: dict[int, Node] = {}
    reached, stack = False, [w]
    while stack:
        value = stack.pop()
        if value == v:
            reached = True
            continue
        if graph.values[value].constant:
            continue
        node = graph.producer(value)
        if node is None or node.index <= first:
            return None
        if node.index not in nodes:
            nodes[node.index] = node
            stack.extend(node.inputs)
    return [nodes[i] for i in sorted(nodes)] if reached and nodes else None


def _block(
    model: nn.Module, graph: Graph, add: Node, v: int, w: int, region: list[Node]
) -> Candidate:
    inside = {n.index for n in region}
    macs = sum(n.macs for n in region)
    params = {p for n in region for value in n.inputs for p in params_behind(graph, value)}
    params |= {
        f"{n.call.path}.{p}"
        for n in region
        if n.op == "gate"
        for p, _ in n.call.module.named_parameters()
    }
    by_name = dict(model.named_parameters())
    num_params = sum(by_name[p].numel() for p in params if p in by_name)
    reason = None
    for n in region:
        for value in n.outputs:
            outside = [u for u in graph.users.get(value, []) if u.index not in inside]
            outside = [u for u in outside if u is not add or value != w]
            if outside or value in graph.outputs:
                reason = (
                    f"an inner value of the branch ({n.op} in {n.call.path}) is used outside it"
                )
    gate = "" if reason else find_gate(model, graph, w, inside, add)
    if reason is None and not gate:
        reason = "no module at the branch's end whose output can be scaled"
    unit = Unit(add.call.path, "block", macs, num_params, reason is None, reason)
    return Candidate(unit, gate=gate, add=add.index, value=v, nodes=frozenset(inside))


def find_gate(model: nn.Module, graph: Graph, w: int, inside: set[int], add: Node) -> str:
    """Return the path of the module nearest to the addition whose output carries the branch."""
    ancestors = set()
    call: Call | None = add.call
    while call is not None:
        ancestors.add(call.index)
        call = call.parent
    value = w
    while True:
        # A BatchNorm first: there the scale costs no pass over the activations.
        # The gate of an earlier conversion before anything else.
        for candidate in sorted(
            graph.calls_to(value),
            key=lambda c: (
                0 if isinstance(c.module, BranchGate) else 2 - is_plain_norm(c.module),
                -c.index,
            ),
        ):
            if candidate.index in ancestors:
                continue
            if candidate.start == candidate.end and graph.values[value].producer is None:
                continue
            if any(
                i not in inside
                for i in range(candidate.start, candidate.end)
                if graph.nodes[i].op != "empty" and not _constant(graph, graph.nodes[i])
            ):
                continue
            if isinstance(candidate.module, BranchGate):
                return candidate.path
            if any(
                isinstance(model.get_submodule(p), BranchGate) for p in _parents(candidate.path)
            ):
                continue
            if why_untouchable(model, graph, candidate.path) is None and not isinstance(
                candidate.module, ResConv
            ):
                return candidate.path
        node = graph.producer(value)
        if node is None or node.index not in inside:
            return ""
        if kind(graph, node) != "homogeneous":
            return ""
        data = [v for v in node.inputs if not graph.values[v].constant]
        if len(data) != 1 or any(u is not node for u in graph.users.get(data[0], [])):
            return ""
        value = data[0]


def _parents(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _constant(graph: Graph, node: Node) -> bool:
    return all(graph.values[v].constant for v in node.outputs)


def _with_names(found: list[Candidate], graph: Graph) -> list[Candidate]:
    """Name a block by the module that adds; with several additions there, by the branch as well."""
    seen: dict[str, int] = {}
    for c in found:
        seen[c.unit.name] = seen.get(c.unit.name, 0) + 1
    taken: set[str] = set()
    for c in found:
        owner = c.unit.name
        placed = next((k.module for k in graph.calls if c.gate and k.path == c.gate), None)
        if isinstance(placed, BranchGate) and placed.unit:
            c.unit = replace(c.unit, name=placed.unit)
            continue
        name = owner or "root"
        if seen[owner] > 1 or not owner:
            branch = c.gate.removeprefix(owner + ".") if c.gate else f"add{c.add}"
            name = f"{owner}/{branch}"
        while name in taken:
            name += "'"
        taken.add(name)
        c.unit = replace(c.unit, name=name)
    return found


def params_behind(graph: Graph, value: int) -> Iterator[str]:
    if graph.values[value].param is not None:
        yield graph.values[value].param  # type: ignore[misc]
    elif graph.values[value].constant and (node := graph.producer(value)) is not None:
        for v in node.inputs:
            yield from params_behind(graph, v)


def _shared_params(model: nn.Module) -> set[str]:
    seen: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        seen.setdefault(id(param), []).append(name)
    return {name for names in seen.values() if len(names) > 1 for name in names}


def _num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _short(numbers: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in numbers) if len(set(numbers)) > 1 else str(numbers[0])
