"""One module's forward as it was recorded, traced on values of the recorded kinds."""

import inspect
import operator
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..analysis.graph import Call, Graph, Node, Ref
from ..analysis.inputs import evaluating
from ..analysis.recorder import record
from ..errors import TraceError
from ..nn.gates import is_leaf
from .arguments import leaves, template
from .tracing import Trace, trace_forward

__all__ = ["Form", "device_of", "fill", "signature"]


class _Tagging(fx.Interpreter):
    current: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n.name
        return super().run_node(n)


class Form:
    """A module's own forward, traced with some of its arguments fixed.

    With ``fake``, its tensors have shapes and memory, and no numbers: nothing is computed. What it
    runs is to be compared with the record in any case.
    """

    def __init__(
        self,
        graph: Graph,
        module: nn.Module,
        given: dict[str, Any],
        constants: dict[str, Any],
        *,
        fake: bool,
    ) -> None:
        self.module, self.constants = module, constants
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
        device = device_of(module)
        shapes = template(inspect.signature(module.forward), constants)
        with torch.random.fork_rng(devices=[]), self.fakes:
            self.values = [
                fill(graph, leaf, device)
                for name, shape in shapes.items()
                for leaf in leaves(shape, given.get(name, ()))
            ]
        self.trace = self._traced(training=False)

    @cached_property
    def in_training(self) -> Trace:
        """The same forward, traced in training mode."""
        return self._traced(training=True) if self.trace.asks else self.trace

    def _traced(self, *, training: bool) -> Trace:
        return trace_forward(
            self.module, self.constants, self._decide, training=training, keep=False
        )

    def _decide(self, node: fx.Node) -> Any:
        with self.fakes:
            return _decide(self.module, node, self.values)

    @property
    def text(self) -> Hashable:
        """Return what two traces have in common that do the same with alike children."""
        code = self.trace.graph.python_code("self")
        try:
            return code.src, frozenset(code.globals.items()), repr(self.constants)
        except TypeError:  # it names what cannot be told from others
            return object()

    def ran(self) -> list[Node]:
        """Return the operations that the trace runs, each tagged with the name of its traced node."""
        vars(self.module).update(self.trace.made)
        interpreter = _Tagging(self.module, graph=self.trace.graph)

        class Runner(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, *args: Any) -> Any:
                return interpreter.run(*args)

        try:
            with self.fakes:
                seen = record(
                    Runner(self.module),
                    tuple(self.values),
                    leaf=is_leaf,
                    tag=lambda: interpreter.current,
                )
        finally:
            for name in self.trace.made:
                delattr(self.module, name)
        return seen.nodes


def signature(graph: Graph, call: Call) -> Hashable:
    """Return what a call did, whichever module of a net it was: equal for blocks that are alike.

    The operations, in which child they ran, which of the values they read and wrote, and the shapes
    and memory of these. A trace whose text is that of another one, over children that did the same,
    runs what the other one runs.
    """
    numbers: dict[int, int] = {}
    memories: dict[int, int] = {}
    rows: list[Hashable] = []

    def number(value: int) -> int:
        if value not in numbers:
            numbers[value] = len(numbers)
            v = graph.values[value]
            memory = memories.setdefault(v.memory, len(memories))
            rows.append((v.shape, v.stride, v.dtype, memory, v.constant))
        return numbers[value]

    for node in graph.nodes[call.start : call.end]:
        place = node.call.path[len(call.path) :] if node.call is not call else ""
        values = (node.inputs, node.outputs, node.writes)
        kind = type(node.call.module) if node.op == "gate" else None
        rows.append((node.op, kind, place, *(tuple(number(v) for v in vs) for vs in values)))
    return tuple(rows)


def device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def fill(graph: Graph, leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Ref):
        return leaf
    value = graph.values[leaf.value]
    # In memory as it was recorded: whether reshape copies, and which product Linear takes,
    # depends on that.
    size = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride, strict=True))
    some = torch.rand(max(size, 1), device=device).to(value.dtype)
    return some.as_strided(value.shape, value.stride)


_NUMBERS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


class _NoNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to hand out a tensor's numbers, which the next input may not share."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name.split("::")[-1] in _NUMBERS:
            raise TraceError("it branches on the numbers in a tensor")
        return func(*args, **(kwargs or {}))


def _decide(module: nn.Module, condition: fx.Node, values: list[Any]) -> Any:
    """Return what a condition or a length comes to on the recorded shapes.

    Raises:
        TraceError: it depends on a tensor's numbers, which the next input may not share.
    """
    places = [n for n in condition.graph.nodes if n.op == "placeholder"]
    known = dict(zip(places, values, strict=True))

    def value(node: fx.Node) -> Any:
        if node in known:
            return known[node]
        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(module)
        elif node.op == "call_module":
            called = module.get_submodule(str(node.target))
            known[node] = type(called).__call__(called, *args, **kwargs)
        else:
            with _NoNumbers():  # type: ignore[no-untyped-call]
                known[node] = _result(node, args, kwargs)
        return known[node]

    with evaluating(module):
        found = value(condition)
    if not isinstance(found, bool | int | float):
        raise TraceError(f"it branches on the numbers in a {type(found).__name__}")
    return found


def _result(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
