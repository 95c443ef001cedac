"""In-place operations that a removal would turn against memory that is still needed.

A conv writes its output to fresh memory, so what comes behind it may write in place. With the conv
gone that memory is the conv's input, and what happens to it matters to

    the forward pass    an older value is read afterwards, or returned, or belongs to the caller
    the backward pass   autograd has kept it (analysis/saved.py), or forbids writing into such a view

The writing module is then put out of place. Where it has no such mode, the removed unit leaves a
copy: always, or for the backward pass alone (edit "copy", no cost in inference). With a copy at each
removed unit memory is shared as it was before, so the model's own writes stay as safe as they were.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..analysis.graph import Call, Graph, Node, Ref, Value
from ..analysis.inputs import as_call, evaluating, to_device_of
from ..analysis.saved import kept_for_backward
from ..nn.gates import Multiply
from .decisions import Surgery
from .provenance import provenance_of
from .verification import relative_error

__all__ = ["Kind", "Writes", "same_flow", "unsafe_writes"]

# Autograd allows no write into one of several views that one operation made.
_SEVERAL_VIEWS = {"split", "split_with_sizes", "chunk", "unbind", "tensor_split"}


Kind = Literal["clone", "copy"]


@dataclass
class Writes:
    """What makes every write safe: modules put out of place, and copies, by passed-by operation."""

    outplace: list[str] = field(default_factory=list)
    copies: dict[int, Kind] = field(default_factory=dict)  # "copy": for backward alone


def unsafe_writes(model: nn.Module, todo: Surgery, covered: set[int]) -> Writes:
    """Return what has to write or copy elsewhere; ``covered`` are the nodes within identities."""
    frozen = _frozen(model, todo)
    found = _settled(todo, covered, frozen, set())
    relied_on = _relied_on(model, todo, found.outplace)
    return _settled(todo, covered, frozen, relied_on) if relied_on else found


def _frozen(model: nn.Module, todo: Surgery) -> set[int]:
    """Return the values that need no gradient, in a net in which others do."""
    graph = todo.graph
    key = "needs no gradient", ""
    if key not in graph.known:
        graph.known[key] = _without_gradient(model, graph)
    found: set[int] = graph.known[key]
    return found


def _without_gradient(model: nn.Module, graph: Graph) -> set[int]:
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moving = {v.index for v in graph.values if v.param in trained}
    for node in graph.nodes:
        inside = node.op == "gate" and any(p.requires_grad for p in node.call.module.parameters())
        if inside or moving.intersection(node.inputs):
            moving.update(node.outputs)
    return {v.index for v in graph.values if v.index not in moving} if trained else set()


def _settled(todo: Surgery, covered: set[int], frozen: set[int], fixed: set[str]) -> Writes:
    """Return what makes every write safe, with the modules in ``fixed`` as they are."""
    found = Writes()
    for call in _silent(todo, covered):
        memory = _Memory(todo, found, covered, backward=True)
        assert isinstance(call.args[0], Ref)
        if memory.removed(call.args[0].value) and call.path not in found.outplace:
            found.outplace.append(call.path)
    unsettled = True
    while unsettled:
        forward = _settle(todo, found, covered, fixed, backward=False)
        unsettled = _settle(todo, found, covered, fixed, backward=True) or forward
    for place in found.copies:
        # What needs no gradient may be kept all the same, for that of a weight it meets.
        if todo.graph.nodes[place].inputs[todo.bypassed[place]] in frozen:
            found.copies[place] = "clone"
    return found


def _relied_on(model: nn.Module, todo: Surgery, paths: list[str]) -> set[str]:
    """Return those modules whose write the net reads elsewhere than in what they return.

    ``act(x); return x`` is such a net. The record shows one tensor in both places, so the modules
    are tried out of place: all at once, and one by one if that changes the outputs.
    """
    inputs = provenance_of(model).inputs
    if not paths or inputs is None:
        return set()

    def run() -> Any:
        args, kwargs = as_call(to_device_of(model, inputs.make()))
        with evaluating(model):
            return model(*args, **kwargs)

    # The record may be one of other inputs.
    before = run()

    def differs(some: list[str]) -> bool:
        modules: list[Any] = [model.get_submodule(path) for path in some]
        try:
            for module in modules:
                module.inplace = False
            out = run()
        finally:
            for module in modules:
                module.inplace = True
        return relative_error(out, before) > 1e-6

    return {path for path in paths if differs([path])} if differs(paths) else set()


def _silent(todo: Surgery, covered: set[int]) -> Iterator[Call]:
    """Yield the calls that write in place in training only (a dropout): no record shows them."""
    for call in todo.graph.calls:
        if getattr(call.module, "inplace", None) is not True or not call.args:
            continue
        if call.output != call.args[0] or not isinstance(call.output, Ref):
            continue
        maker = todo.graph.producer(call.output.value)
        inside = call.start in covered and call.start - 1 in covered
        if not inside and (maker is None or maker.index not in todo.dead):
            yield call


def _settle(
    todo: Surgery, found: Writes, covered: set[int], fixed: set[str], backward: bool
) -> bool:
    """Make the first unsafe write into each piece of memory safe; say whether there was one."""
    memory = _Memory(todo, found, covered, backward)
    touched: set[int] = set()
    for write in memory.alive:
        for target in write.writes:
            home = memory.home[target]
            if home in touched or write.index in memory.outplaced or not memory.joined(home):
                continue
            hazards = list(memory.hazards(write, target))
            if not hazards:
                continue
            touched.add(home)
            place = hazards[0][0]
            kind: Kind = "clone" if (place, "clone") in hazards else "copy"
            module, path = write.call.module, write.call.path
            modal = getattr(module, "inplace", None) is True and path not in fixed
            if modal and not _seen_elsewhere(todo, module):
                found.outplace.append(path)
            else:
                found.copies[place] = kind
    return bool(touched)


def _seen_elsewhere(todo: Surgery, module: nn.Module) -> bool:
    """Whether what the module writes is read through another view of the same memory."""
    graph = todo.graph
    written = {v for n in graph.nodes if n.call.module is module and n.writes for v in n.outputs}
    for node in graph.nodes:
        if node.op == "aliased_write" and written.intersection(node.inputs):
            written.update(node.outputs)
            if any(v in graph.outputs or _readers(todo, v) for v in node.outputs):
                return True
    return False


def _readers(todo: Surgery, value: int) -> list[Node]:
    return [
        node
        for node in todo.graph.users.get(value, [])
        if node.index not in todo.dead and node.op != "aliased_write"
    ]


def same_flow(ours: list[Node], theirs: list[Node]) -> bool:
    """Whether two runs of the same operations read the same values among those they made.

    They do not where a traced ``x += y``, which makes a new tensor, has to change an older name of x.
    """
    known: dict[int, int] = {}
    made = {v for node in ours for v in node.outputs}
    for one, other in zip(ours, theirs, strict=True):
        if len(one.inputs) != len(other.inputs) or len(one.outputs) != len(other.outputs):
            return False
        pairs = zip(one.inputs, other.inputs, strict=True)
        if any(v in made and known.get(v) != w for v, w in pairs):
            return False
        known.update(zip(one.outputs, other.outputs, strict=True))
    return True


class _Memory:
    """Which values share memory in the compact net, and through which removed operations."""

    def __init__(self, todo: Surgery, found: Writes, covered: set[int], backward: bool) -> None:
        self.todo, self.graph, self.backward = todo, todo.graph, backward
        self.covered = covered
        copies = {i for i, kind in found.copies.items() if backward or kind == "clone"}
        every = [n for n in self.graph.nodes if n.index not in todo.dead]
        folded = {n.index for n in every if todo.fuse and isinstance(n.call.module, Multiply)}
        gone = folded | covered | todo.bypassed.keys()
        self.alive = [n for n in every if n.index not in gone]
        self.outplaced = {n.index for n in self.alive if n.writes and n.call.path in found.outplace}
        # value -> what it is in memory with, and the removed operation between them
        self.source: dict[int, tuple[int, int | None]] = {}
        shared = self.graph.table(_shared)
        for node in every:
            if node.index in todo.bypassed:
                if node.index not in copies:
                    read = node.inputs[todo.bypassed[node.index]]
                    self.source[node.outputs[0]] = (read, node.index)
            elif node.index in folded:
                self.source[node.outputs[0]] = (node.inputs[0], None)
            elif node.index not in self.outplaced:
                for made, read_from in shared[node.index]:
                    self.source[made] = (read_from, None)
        self.home = list(range(len(self.graph.values)))
        for value in sorted(self.source):
            # What a value shares memory with is older, save for one made outside of all modules.
            self.home[value] = self.home[self.source[value][0]]
        self.through = {
            self.home[value] for value, (_, removed) in self.source.items() if removed is not None
        }
        self.kept: dict[int, list[tuple[int, Node]]] = {}
        if backward and self.through:
            kept = self.graph.table(_kept)
            for node in self.alive:
                for value in kept[node.index]:
                    if self.joined(self.home[value]):
                        self.kept.setdefault(self.home[value], []).append((value, node))

    def joined(self, home: int) -> bool:
        return home in self.through

    def removed(self, value: int) -> list[int]:
        """Return the removed operations on the way from the value to where its memory was made."""
        return [i for _, i in self._way(value) if i is not None]

    def _way(self, value: int) -> Iterator[tuple[int, int | None]]:
        while value in self.source:
            yield self.source[value]
            value = self.source[value][0]

    def hazards(self, write: Node, target: int) -> Iterator[tuple[int, str]]:
        """Yield why the write is unsafe: a removed operation where a copy helps, and which kind."""
        home = self.home[target]
        first = min(write.outputs, default=len(self.graph.values))
        if self.backward:
            for value, node in self.kept.get(home, ()):
                if node.index > write.index or value in write.outputs:
                    continue
                for place in self._between(target, value)[:1]:
                    yield place, "copy"
            yield from self._forbidden(target)
            return
        for value in range(first):
            if self.home[value] != home:
                continue
            late = any(
                n.index > write.index
                and (n.index not in self.covered or n.index in self.todo.bypassed)
                for n in _readers(self.todo, value)
            )
            if late or value in self.graph.outputs:
                for place in self._between(target, value)[:1]:
                    yield place, "clone"
        root = self.graph.values[home]
        way = self.removed(target)
        if way and (home in self.graph.inputs or (root.constant and root.producer is None)):
            yield way[0], "clone"  # the caller's own memory, or a parameter's
        for value, removed in self._way(target):
            if removed is not None and _overlaps(self.graph.values[value]):
                yield removed, "clone"

    def _between(self, a: int, b: int) -> list[int]:
        """Return the removed operations that brought the two values into one memory."""
        one, other = self.removed(a), self.removed(b)
        return [i for i in one if i not in other] + [i for i in other if i not in one]

    def _forbidden(self, target: int) -> Iterator[tuple[int, str]]:
        """Yield the removed operation between the target and a view that nothing may write into."""
        place = None
        for value, removed in self._way(target):
            place = place if removed is None else removed
            maker = self.graph.producer(value)
            if place is not None and maker is not None and maker.op in _SEVERAL_VIEWS:
                yield place, "clone"


def _shared(graph: Graph, node: Node) -> list[tuple[int, int]]:
    """Return the outputs that are in memory with an input, with that input."""
    values = graph.values
    inputs = node.inputs[1:] if node.op == "aliased_write" else (*node.writes, *node.inputs)
    found = []
    for made in node.outputs:
        memory = values[made].memory
        read = next((v for v in inputs if values[v].memory == memory), None)
        if read is not None:
            found.append((made, read))
    return found


def _kept(graph: Graph, node: Node) -> tuple[int, ...]:
    return sum(kept_for_backward(graph, node), ())


def _overlaps(value: Value) -> bool:
    """Whether several entries stand at one place in memory, as ``expand`` has it."""
    return any(n > 1 and s == 0 for n, s in zip(value.shape, value.stride, strict=True))
