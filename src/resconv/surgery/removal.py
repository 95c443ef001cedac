"""What each value of the compact net stands for, decided in one walk over the record.

A removed layer leaves ``y = p * x``, a removed branch ``y = x``: the values become one, up to a
positive factor. That can make further operations redundant, each exactly:

    a x + b x                       (a + b) x, where both summands are one value now
    relu(y) with y >= 0             y; likewise any clamp whose limits the values already respect
    clamp(a clamp(x)), a >= 1       clamp(a x), with limits l <= 0 <= u: the first one goes
"""

import math

from torch import nn

from ..analysis.candidates import Candidate
from ..analysis.finding import find_branches
from ..analysis.graph import Call, Graph, Node, Ref
from ..analysis.ops import bounds, clamp_limits, is_identity, kind
from ..errors import PruneError
from ..nn.gates import Blend, BranchGate, FactorGate, Gate, Multiply, ResConv, Segment, Soften
from .decisions import Surgery

__all__ = ["decide"]


def decide(
    model: nn.Module,
    graph: Graph,
    remove: tuple[str, ...],
    *,
    fuse: bool,
    keep: frozenset[int] = frozenset(),
    indexed: set[int] | None = None,
    blocks: list[Candidate] | None = None,
    idle: frozenset[str] = frozenset(),
) -> Surgery:
    """Return which values stand for which others once the named units are gone.

    ``keep`` names operations that could go, but have to stay for another reason. ``blocks`` are the
    branches of the record, found here if they are not given. ``idle`` are those of the units that go
    only because they count nothing: of two such sides of a sum the second stays.

    Raises:
        PruneError: a unit cannot go; the message says why.
    """
    todo = Surgery(graph, fuse=fuse, indexed=indexed or set())
    calls = {c.module.unit or c.path: c for c in graph.calls if isinstance(c.module, Gate)}
    for name in remove:
        if name not in calls:
            raise PruneError(f"{name} does not run in the model's forward.")
    chosen = {calls[name].path: name for name in remove}
    branches = {p: n for p, n in chosen.items() if isinstance(calls[n].module, BranchGate)}
    if branches and blocks is None:
        blocks = find_branches(model, graph)
    additions = _removed_branches(todo, branches, blocks or [], idle)
    settled = _settled_segments(todo, chosen, fuse)
    walk = _Walk(todo, fuse, keep | _of_shortcuts(graph))
    for node in graph.nodes:
        if node.index in todo.dead:
            continue
        if node.index in additions:
            walk.pass_by(node, additions[node.index], 1.0)
        elif node.index in settled:
            walk.pass_by(node, settled[node.index], 1.0)
        elif isinstance(node.call.module, ResConv) and node.call.path in chosen:
            walk.pass_by(node, 0, _control(chosen[node.call.path], node.call.module))
        else:
            walk.visit(node)
    return todo


def _of_shortcuts(graph: Graph) -> frozenset[int]:
    """Return the operations of what segments leave: all of it stays, or none."""
    return frozenset(
        i
        for call in graph.calls
        if call.parent is not None
        and isinstance(segment := call.parent.module, Segment)
        and call.module is segment.left
        for i in range(call.start, call.end)
    )


def _settled_segments(todo: Surgery, chosen: dict[str, str], fuse: bool) -> dict[int, int]:
    """Mark the side of each segment as dead that goes; return the blends with the side that stays."""
    graph = todo.graph
    settled = {}
    for call in graph.calls:
        segment = call.module
        if not isinstance(segment, Segment):
            continue
        removed = call.path in chosen
        if not removed and not (fuse and segment.scale.item() == 1):
            continue
        inner = [c for c in graph.calls if c.parent is call]
        blend = next(graph.nodes[c.start] for c in inner if isinstance(c.module, Blend))
        settled[blend.index] = int(removed)
        gone = segment.module if removed else segment.left
        todo.dead.update(i for c in inner if c.module is gone for i in range(c.start, c.end))
        if removed and segment.kind == "segment":
            todo.replaced.append(call.path)
    for node in graph.nodes if fuse else ():
        parent = node.call.parent
        if isinstance(node.call.module, Soften) and parent is not None:
            assert isinstance(parent.module, FactorGate)
            if parent.module.scale.item() == 1:
                settled[node.index] = 0
    todo.replaced = [p for p in todo.replaced if not _is_dead(todo, graph.calls_of(p)[0])]
    return settled


def _is_dead(todo: Surgery, call: Call) -> bool:
    return call.end - 1 in todo.dead


def _removed_branches(
    todo: Surgery, chosen: dict[str, str], blocks: list[Candidate], idle: frozenset[str]
) -> dict[int, int]:
    """Mark the branches as dead; return their additions with the position of the shortcut."""
    by_gate = {c.gate: c for c in blocks}
    additions = {}
    for path, name in chosen.items():
        candidate = by_gate.get(path)
        if candidate is None or not candidate.unit.removable:
            raise PruneError(f"{name} is no part of a sum or a product in the forward any more.")
        add = todo.graph.nodes[candidate.add]
        if add.index in additions and name in idle:
            continue
        if add.index in additions:
            raise PruneError(
                f"Only one side of the sum in {add.call.path or 'the forward'} can go, and the plan "
                f"removes both: {name} is the second. Leave one of them in."
            )
        position = next(i for i, a in enumerate(add.args[:2]) if a == Ref(candidate.value))
        additions[add.index] = position
        todo.dead |= candidate.nodes
    return additions


def _control(name: str, gate: nn.Module) -> float:
    assert isinstance(gate, ResConv)
    assert gate.control is not None
    p = gate.control.item()
    if p == 0 or not math.isfinite(p):
        raise PruneError(
            f"{name} has control {p:g}: with scale 0 its output would be {p:g} everywhere. "
            "It never learned its shortcut; train it longer, convert with start='identity', "
            "or leave it out of the plan."
        )
    return p


class _Walk:
    """The values seen so far: their range, and which value each is a multiple of."""

    def __init__(self, todo: Surgery, fuse: bool, keep: frozenset[int]) -> None:
        self.todo, self.graph, self.fuse, self.keep = todo, todo.graph, fuse, keep
        self.known: list[tuple[float, float]] = [(-math.inf, math.inf)] * len(self.graph.values)
        self.multiple: dict[int, tuple[int, float]] = {}
        self.touched: set[int] = set()  # values whose maker, or whose maker's maker, is gone

    def of(self, value: int) -> tuple[int, float]:
        return self.multiple.get(value, (value, 1.0))

    def _same(self, made: int, read: int, factor: float) -> None:
        base, before = self.of(read)
        self.multiple[made] = (base, before * factor)

    def pass_by(self, node: Node, position: int, factor: float) -> None:
        """Let the node's output be ``factor`` times what it reads at ``position``."""
        read, made = node.inputs[position], node.outputs[0]
        self.todo.bypassed[node.index] = position
        self.todo.same_as[made] = read
        if factor != 1.0:
            self.todo.factors[node.index] = factor
        self.known[made] = _times(self.known[read], factor)
        self._same(made, read, factor)
        self._forget(node)
        self.touched.add(made)

    def visit(self, node: Node) -> None:
        """Keep the node, or pass it by where a removal made it redundant."""
        span = bounds(self.graph, node, self.known)
        if self.fuse and node.op == "gate" and isinstance(node.call.module, Multiply):
            assert node.call.parent is not None
            assert isinstance(node.call.parent.module, BranchGate)
            scale = node.call.parent.module.scale.item()
            self._same(node.outputs[0], node.inputs[0], scale)
            span = _times(self.known[node.inputs[0]], scale)
        elif is_identity(node):
            self._same(node.outputs[0], node.inputs[0], 1.0)
        if node.index not in self.keep:
            if self._is_sum_of_one_value(node):
                (value, a), (_, b) = (self.of(v) for v in node.inputs)
                # Through the summand with a removed layer in it, not the value itself.
                position = 0 if node.inputs[0] != value else 1
                self.todo.optional.add(node.index)
                return self.pass_by(node, position, (a + b) / (b if position else a))
            limits = clamp_limits(node)
            if limits is not None and node.inputs[0] in self.touched:
                if self.known[node.inputs[0]] == span:
                    self.todo.optional.add(node.index)
                    return self.pass_by(node, 0, 1.0)
                self._drop_earlier_clamp(node, limits)
        if (
            len(node.inputs) == 1
            and node.inputs[0] in self.touched
            and kind(self.graph, node) == "homogeneous"
        ):
            # a copy or a dropout between the unit and its activation
            self.touched.update(node.outputs)
        for value in node.outputs:
            self.known[value] = span
        self._forget(node)
        return None

    def _forget(self, node: Node) -> None:
        # Another value may stand in its place when the code decides otherwise.
        for value in self.graph.exposed.intersection(node.outputs):
            self.known[value] = (-math.inf, math.inf)

    def _is_sum_of_one_value(self, node: Node) -> bool:
        if node.op not in ("add", "add_") or len(node.args) != 2 or node.kwargs:
            return False
        if len(node.inputs) != 2 or not any(v in self.multiple for v in node.inputs):
            return False
        (v, a), (w, b) = (self.of(i) for i in node.inputs)
        shapes = {self.graph.values[i].shape for i in (*node.inputs, *node.outputs)}
        untouched = a == b == 1.0 and not any(i in self.todo.same_as for i in node.inputs)
        return v == w and a + b > 0 and len(shapes) == 1 and not untouched

    def _drop_earlier_clamp(self, node: Node, limits: tuple[float, float]) -> None:
        """``clamp(a * clamp(x))`` is ``clamp(a * x)`` when nobody else reads between them."""
        value, factor = self.of(node.inputs[0])
        first = self.graph.producer(value)
        if (
            factor < 1.0
            or not limits[0] <= 0.0 <= limits[1]
            or first is None
            or first.index in self.keep
            or first.index in self.todo.bypassed
            or clamp_limits(first) != limits
        ):
            return
        reader = first
        while reader is not node:
            made = reader.outputs[0]
            users = self.graph.users.get(made, [])
            readers = [n for n in users if n.index not in self.todo.dead]
            if made in self.graph.outputs or len(readers) != 1:
                return
            reader = readers[0]
        read = first.inputs[0]
        self.todo.optional.add(first.index)
        self.todo.bypassed[first.index] = 0
        self.todo.same_as[value] = read


def _times(span: tuple[float, float], factor: float) -> tuple[float, float]:
    if factor == 0:  # 0 times infinity is no number
        return 0.0, 0.0
    low, high = sorted(factor * limit for limit in span)
    return low, high
