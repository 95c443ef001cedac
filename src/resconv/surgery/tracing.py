"""One module's own forward as a ``torch.fx`` graph, every module it calls being one call.

What fx cannot know from the code alone (which way a branch on a size goes, how many items a tuple
has) is decided by the caller, and the decision is asserted in the graph.
"""

import copy
import hashlib
import inspect
import operator
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..analysis.asking import hides_its_mode, noting_modes
from ..errors import PruneError, TraceError
from .arguments import FREE, filled, leaves, template
from .edit_kinds import PassedBy

__all__ = ["OTHER_BRANCH", "Trace", "digest", "pass_by", "trace_forward", "used"]

Decide = Callable[[fx.Node], Any]
OTHER_BRANCH = (
    "This forward was rewritten by resconv for its example's size, and branches on it: convert and "
    "prune with an example of the size that you run."
)
_RANDOM = ("rand", "randn", "randint", "randperm", "bernoulli", "normal")
_FACTORIES = (*_RANDOM, "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "tensor")
# While fx traces, it patches nn.Module; older versions of torch have no way to lift that meanwhile.
_unpatched = getattr(fx._symbolic_trace, "_maybe_revert_all_patches", nullcontext)
_FX = str(Path(fx.__file__).parent)


@dataclass
class Trace:
    """A traced forward: ``decisions`` it took, and where in the code each operation stands."""

    graph: fx.Graph
    decisions: list[bool | int] = field(default_factory=list)
    places: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)  # tensors that the code makes itself
    asks: bool = True  # whether the code may do something else in the other mode

    def copy(self) -> "Trace":
        """Return a trace whose graph may be changed without this one's."""
        return replace(self, graph=copy.deepcopy(self.graph))


class _Sized(fx.Proxy):
    """A proxy whose number of items may be asked for: it is decided, and asserted in the graph."""

    def __len__(self) -> int:
        return self.tracer.count(self)  # type: ignore[attr-defined, no-any-return]

    def __getattr__(self, name: str) -> Any:
        return _SizedAttribute(self, name)


class _SizedAttribute(fx.proxy.Attribute, _Sized):
    pass


class _OwnForward(fx.Tracer):
    def __init__(self, arguments: dict[str, Any], decide: Decide) -> None:
        super().__init__()
        self.arguments, self.decide = arguments, decide
        self.decisions: list[bool | int] = []
        self.places: dict[str, tuple[Any, ...]] = {}
        self.seen: dict[tuple[Any, ...], int] = {}
        self.deciding = False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        signature = inspect.signature(self.root.forward)
        flat: list[Any] = []
        bound = signature.bind_partial()
        for name, shape in self.arguments.items():
            count = sum(1 for _ in leaves(shape, filled(shape, iter(lambda: None, 0))))
            nested = shape is not FREE
            names = [f"{name}_{i}" if nested else name for i in range(1, count + 1)]
            proxies = [self.create_proxy("placeholder", n, (), {}) for n in names]
            flat += proxies
            bound.arguments[name] = filled(shape, iter(proxies))

        def own_forward(*_: Any) -> Any:
            return self.root.forward(*bound.args, **bound.kwargs)

        self.start = own_forward.__code__
        return own_forward, flat

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        place = self._place()
        self.seen[place] = self.seen.get(place, 0) + 1
        self.places[node.name] = (*place, self.seen[place])
        return node

    def _place(self) -> tuple[Any, ...]:
        """Return where the code of the forward stands: its file, function and instruction."""
        place = []
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not getattr(self, "start", None):
            code = frame.f_code
            if not code.co_filename.startswith(_FX):
                place.append((code.co_filename, code.co_firstlineno, _position(frame)))
            frame = frame.f_back  # type: ignore[assignment]
        return tuple(place)

    def to_bool(self, obj: Any) -> bool:
        chosen = bool(self._decided(obj.node))
        self.decisions.append(chosen)
        self._hold(obj if chosen else self.create_proxy("call_function", operator.not_, (obj,), {}))
        return chosen

    def count(self, obj: Any) -> int:
        """Return how many items the value has."""
        size = self.create_proxy("call_function", len, (obj,), {})
        number = int(self._decided(size.node))
        self.decisions.append(number)
        self._hold(self.create_proxy("call_function", operator.eq, (size, number), {}))
        return number

    def _decided(self, node: fx.Node) -> Any:
        self.deciding = True
        try:
            with _unpatched():  # what the decision runs is no part of the graph
                return self.decide(node)
        finally:
            self.deciding = False

    def asked_by(self, found: list[nn.Module]) -> Callable[[nn.Module], None]:
        """Return what notes the modules that the traced code asks for their mode."""
        return lambda module: None if self.deciding else found.append(module)

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[i] for i in range(self.count(obj))])

    def _hold(self, condition: Any) -> None:
        self.create_proxy("call_function", torch._assert, (condition, OTHER_BRANCH), {})


def trace_forward(
    module: nn.Module,
    constants: dict[str, Any],
    decide: Decide,
    *,
    training: bool = False,
    keep: bool = True,
) -> Trace:
    """Trace the module's own forward, in eval mode or in training mode.

    Arguments in ``constants`` (encoded) are fixed; ``decide`` returns what a condition or a length
    comes to. Without ``keep``, tensors that the forward makes are not left on the module.

    Raises:
        TraceError: random numbers decide what the forward does.
    """
    tracer = _OwnForward(template(inspect.signature(module.forward), constants), decide)
    modes = [(m, m.training) for m in module.modules()]
    before = set(vars(module))
    state = _random_state()
    asking: list[nn.Module] = []
    module.train(training)
    try:
        with _recorded_factories(tracer), noting_modes(tracer.asked_by(asking)):
            graph = tracer.trace(module)
        if not _same_state(state, _random_state()):
            raise TraceError("random numbers decide what it does")
    finally:
        _set_random_state(state)
        for m, mode in modes:
            m.training = mode
        made = {name: vars(module)[name] for name in set(vars(module)) - before}
        if not keep:
            for name in made:
                delattr(module, name)
    # A graph is copied and pickled with its tracer's class, which nobody needs any more.
    graph._tracer_cls = None
    asks = bool(asking) or hides_its_mode(module)
    return Trace(graph, tracer.decisions, tracer.places, made, asks)


def _position(frame: types.FrameType) -> Any:
    """Return the lines and columns that run in a frame.

    Not the instruction: CPython runs the same call by other instructions once it is specialised.
    """
    found = _positions(frame.f_code)[frame.f_lasti // 2]
    return frame.f_lasti if None in found else found


@lru_cache(maxsize=256)
def _positions(code: types.CodeType) -> list[Any]:
    return list(code.co_positions())


@contextmanager
def _recorded_factories(tracer: _OwnForward) -> Iterator[None]:
    """Let ``torch.rand(x.shape)`` and its like be operations of the graph."""
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def recorded(name: str, original: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer.deciding:
                return original(*args, **kwargs)
            found: list[Any] = []
            fx.node.map_aggregate(
                (args, kwargs), lambda a: found.append(a) if isinstance(a, fx.Proxy) else None
            )
            if found or name in _RANDOM:
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(torch, name, recorded(name, original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    return torch.get_rng_state(), random.getstate(), drawn


def _same_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return torch.equal(a[0], b[0]) and a[1] == b[1] and _plain(a[2]) == _plain(b[2])


def _plain(state: Any) -> Any:
    """Return a state of numpy's generator as something that ``==`` compares in one go."""
    if not isinstance(state, tuple):
        return repr(state)
    return [x.tobytes() if hasattr(x, "tobytes") else x for x in state]


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    if state[2] is not None:
        sys.modules["numpy"].random.set_state(state[2])


def digest(graph: fx.Graph) -> str:
    """Return a checksum of the operations in a graph."""
    lines = [f"{n.op} {n.name} {n.target if n.op == 'call_module' else ''}" for n in graph.nodes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def pass_by(graph: fx.Graph, nodes: Sequence[PassedBy], place: str) -> None:
    """Let each named operation return one of its arguments, and drop what nobody reads any more.

    Raises:
        PruneError: there is no such operation, or it passes no value on.
    """
    by_name = {n.name: n for n in graph.nodes}
    # What nobody read from the start and is more than a look at a value acts by itself.
    acting = {n for n in graph.nodes if not n.users and n.target not in _LOOKS}
    for passed in nodes:
        name, argument = passed.name, passed.argument
        node = by_name.get(name)
        operands = [] if node is None else [*node.args, *node.kwargs.values()]
        if node is None or len(operands) <= argument:
            raise PruneError(f"The forward of {place!r} has no operation {name!r} to pass by.")
        replacement = operands[argument]
        if not isinstance(replacement, fx.Node):
            raise PruneError(f"Operation {name!r} of {place!r} does not pass a value on.")
        if passed.copy is not None:
            with graph.inserting_before(node):
                replacement = _copy(graph, replacement, passed.copy)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    # It writes in place, or checks something, and stays. Only how many parts a value has no longer
    # matters where nobody else reads it.
    alive = _needed(n for n in acting if not _counts(n))
    for node in reversed(list(graph.nodes)):
        counts_dead = _counts(node) and _counts(node)[0] not in alive
        unread = node not in acting and not node.users and node.op != "placeholder"
        if unread or counts_dead:
            graph.erase_node(node)
    graph.lint()


_LOOKS = {operator.getitem, getattr, len, operator.eq}


def _counts(node: fx.Node) -> list[fx.Node]:
    """Return the value whose number of parts the node asserts, in a list; empty for other nodes."""
    condition = node.args[0] if node.target is torch._assert else None
    size = condition.args[0] if isinstance(condition, fx.Node) and condition.args else None
    if isinstance(size, fx.Node) and size.target is len:
        return list(size.all_input_nodes)
    return []


def _needed(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _copy(graph: fx.Graph, x: fx.Node, kind: str) -> fx.Node:
    if kind == "clone":
        return graph.call_method("clone", (x,))
    dtype = graph.call_function(getattr, (x, "dtype"))
    needed = graph.call_function(getattr, (x, "requires_grad"))
    return graph.call_method("to", (x, dtype), {"copy": needed})


def used(*graphs: fx.Graph) -> set[str]:
    """Return the paths of modules, parameters and buffers that the graphs name."""
    return {str(n.target) for g in graphs for n in g.nodes if n.op in ("call_module", "get_attr")}
