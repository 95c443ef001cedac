"""One real forward pass, recorded: which operation read what, inside which module.

Why recording and not torch.fx or torch.export: the record is for analysis only, the user's classes
stay as they are, so nothing has to be executable again. Watching a real forward at the dispatcher
sees every tensor operation of any model that runs at all (control flow, scripted helpers, custom
blocks), and needs no per-architecture code. Of the smallest variants of 50 convolutional families of
timm (docs/coverage.md), torch.fx traces 46, in 0.07 s each (median, CPU
time); torch.export all 50, in 0.99 s; a recorded forward all 50, in 0.09 s. fx fails where a forward
branches on a size, and is used for one thing only: to rewrite the forward of a single block
(surgery/rewriting.py), with the branches decided by the record.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from ..errors import TraceError
from ..failures import is_own
from .asking import depends_on_mode, hides_its_mode, noting_modes
from .graph import Call, Graph, Node, Ref, Value
from .inputs import as_call, evaluating, tensors_in, to_device_of

__all__ = ["record", "restored"]

# These change a tensor's shape in place, not its data.
_METADATA_WRITES = {"as_strided_", "squeeze_", "unsqueeze_", "t_", "transpose_", "detach_"}
# A Python value made from a tensor's: what the code does next may depend on it.
_DECISIONS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NO_VALUE = {"empty", "empty_like", "new_empty", "empty_strided"}


def record(
    model: nn.Module,
    example_inputs: Any,
    *,
    leaf: Callable[[nn.Module], bool] = lambda module: False,
    tag: Callable[[], str | None] = lambda: None,
) -> Graph:
    """Run ``model`` once in eval mode and return what happened.

    A module for which ``leaf`` holds is recorded as one node, ``gate``. The model is left as it was.

    Raises:
        TraceError: the forward pass itself fails on these inputs, or there are no numbers to run on.
    """
    _has_numbers(model)
    args, kwargs = as_call(to_device_of(model, example_inputs))
    recorder = _Recorder(model, leaf, tag)
    with evaluating(model), restored(model):
        try:
            graph = recorder.run(args, kwargs)
        except Exception as error:  # whatever the user's forward raises
            if is_own(error):
                raise
            where = recorder.stack[-1].path if recorder.stack else ""
            raise TraceError(
                f"{type(model).__name__} does not run on inputs of shape "
                f"{_shapes((args, kwargs))}: "
                f"{type(error).__name__} in {where or 'its own forward'}: {error}"
            ) from error
    _has_batch(graph, _shapes((args, kwargs)))
    return graph


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(a.shape) for a in tree_leaves(tree) if isinstance(a, Tensor)]


def _has_batch(graph: Graph, shapes: list[tuple[int, ...]]) -> None:
    """Refuse an example without a batch dimension: sizes are per image, and images are many."""
    for call in graph.calls:
        if (
            not isinstance(call.module, _CONVS)
            or not call.args
            or not isinstance(call.args[0], Ref)
        ):
            continue
        shape = graph.values[call.args[0].value].shape
        if len(shape) == call.module.weight.ndim - 1 and shape in shapes:
            raise TraceError(
                f"The example of shape {shape} has no batch dimension: {call.path or 'the model'} "
                f"({type(call.module).__name__}) reads it as one image. Give a batch of one, "
                "example[None]."
            )


def _has_numbers(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise TraceError(
                f"{name} of {type(model).__name__} has no size yet (a lazy module). Run the model "
                "once on an example first."
            )
        if tensor.is_meta:
            raise TraceError(
                f"{name} of {type(model).__name__} is on the meta device and holds no numbers. "
                "Load the weights first (model.to_empty, load_state_dict)."
            )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo what the forward writes into buffers (counters, caches)."""
    before = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, old in before:
                if buffer._version != version and buffer.shape == old.shape:
                    buffer.copy_(old)


def _numbers_of(model: nn.Module) -> dict[str, tuple[torch.UntypedStorage, int]]:
    """Return what changes with a parameter's numbers: its memory, and how often that was written."""
    return {
        name: (p.untyped_storage(), 0 if p.is_inference() else p._version)
        for name, p in model.named_parameters()
        if p.layout == torch.strided
    }


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(
        self, model: nn.Module, leaf: Callable[[nn.Module], bool], tag: Callable[[], str | None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.leaf, self.tag = model, leaf, tag
        self.graph = Graph()
        self.stack: list[Call] = []
        self.inside_leaf: nn.Module | None = None
        self.leaf_macs = 0
        self.deciding: set[int] = set()  # calls whose code goes on as a value says
        self.asked_outside = False
        # Tensors are kept alive, so that an id stays one tensor's for the whole pass.
        self.known: dict[int, tuple[Tensor, int]] = {}
        self.by_storage: dict[int, list[Tensor]] = {}
        self.memories: dict[int, int] = {}
        self.param_names = {id(p): n for n, p in model.named_parameters()}
        self.param_names |= {id(b): n for n, b in model.named_buffers()}

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
        graph = self.graph
        for tensor in tensors_in((args, kwargs)):
            graph.inputs.append(self._new(tensor))
        before = _numbers_of(self.model)
        handles = []
        try:
            for path, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
                    continue
                handles.append(
                    module.register_forward_pre_hook(
                        self._enter(path), with_kwargs=True, prepend=False
                    )
                )
                handles.append(module.register_forward_hook(self._leave, prepend=True))
            with noting_modes(self._asked), self:
                output = self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for name, (memory, version) in _numbers_of(self.model).items():
            if (
                name not in before
                or before[name][1] != version
                or before[name][0]._cdata != memory._cdata
            ):
                graph.written.add(name)
        graph.output = output
        graph.outputs = [self._value(t) for t in tensors_in(output)]
        if self.asked_outside or hides_its_mode(self.model):
            graph.asking = {call.index for call in graph.calls}
        self._expose()
        self.known.clear()
        self.by_storage.clear()
        return graph

    def _asked(self, module: nn.Module) -> None:
        if depends_on_mode(module):
            self.graph.asking.update(call.index for call in self.stack)
            self.asked_outside |= not self.stack  # by a hook of the model itself

    def _expose(self) -> None:
        """Count what a deciding call's code can see among the outputs: it may read all of it."""
        graph = self.graph
        if not self.deciding:
            return
        seen: list[Any] = [graph.calls[i].args for i in self.deciding]
        seen += [graph.calls[i].kwargs for i in self.deciding]
        for node in graph.nodes:
            if node.call.index in self.deciding:
                seen += [Ref(v) for v in (*node.inputs, *node.outputs)]
        for call in graph.calls:
            if call.parent is not None and call.parent.index in self.deciding:
                seen += [call.args, call.kwargs, call.output]
        graph.exposed = {leaf.value for leaf in tree_leaves(seen) if isinstance(leaf, Ref)}
        graph.outputs += sorted(graph.exposed - set(graph.outputs))

    def _refs(self, tree: Any) -> Any:
        return tree_map(lambda a: Ref(self._value(a)) if isinstance(a, Tensor) else a, tree)

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.inside_leaf is not None:
                return
            parent = self.stack[-1] if self.stack else None
            refs = self._refs((args, kwargs))
            call = Call(
                len(self.graph.calls), path, module, parent, refs[0], refs[1], len(self.graph.nodes)
            )
            self.graph.calls.append(call)
            self.stack.append(call)
            if self.leaf(module):
                self.inside_leaf, self.leaf_macs = module, 0

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.inside_leaf is not None and self.inside_leaf is not module:
            return
        call = self.stack.pop()
        if self.inside_leaf is module:
            self.inside_leaf = None
            value = self._new(output)
            read = [a.value for a in call.args if isinstance(a, Ref)]
            read = [read[0], *(v for v in read[1:] if not self.graph.values[v].constant)]
            self._node("gate", call.args, {}, tuple(read), (value,), call, self.leaf_macs)
        call.end = len(self.graph.nodes)
        call.output = self._refs(output)

    def _new(self, tensor: Tensor, producer: int | None = None, constant: bool = False) -> int:
        values = self.graph.values
        value = Value(
            len(values),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.dtype,
            producer,
            constant=constant,
            memory=self.memories.setdefault(_storage(tensor), len(values)),
        )
        values.append(value)
        self._bind(tensor, value.index)
        return value.index

    def _bind(self, tensor: Tensor, value: int) -> None:
        if id(tensor) not in self.known:
            self.by_storage.setdefault(_storage(tensor), []).append(tensor)
        self.known[id(tensor)] = (tensor, value)

    def _value(self, tensor: Tensor) -> int:
        if id(tensor) in self.known:
            return self.known[id(tensor)][1]
        value = self._new(tensor, constant=True)
        self.graph.values[value].param = self.param_names.get(id(tensor))
        return value

    def _node(
        self,
        op: str,
        args: Any,
        kwargs: Any,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        call: Call,
        macs: int = 0,
        writes: tuple[int, ...] = (),
    ) -> Node:
        nodes = self.graph.nodes
        node = Node(len(nodes), op, args, kwargs, inputs, outputs, call, macs, self.tag(), writes)
        nodes.append(node)
        for value in outputs:
            self.graph.values[value].producer = node.index
        return node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor, such as its device
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if self.inside_leaf is None and self.stack:
            refs, kwrefs = self._refs(tuple(args)), self._refs(kwargs)
        output = func(*args, **kwargs)
        macs = _macs(func, args, kwargs, output)
        if self.inside_leaf is not None:
            self.leaf_macs += macs
            return output
        if not self.stack:  # outside every hooked module
            return output
        inputs = tuple(a.value for a in tree_leaves((refs, kwrefs)) if isinstance(a, Ref))
        constant = all(self.graph.values[v].constant for v in inputs)
        if name in _DECISIONS and not constant:
            self.deciding.update(call.index for call in self.stack)
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if name not in _NO_VALUE or inputs:
            index = len(self.graph.nodes)
            made = tuple(self._new(t, index, constant) for t in tensors)
            writes = name not in _METADATA_WRITES
            targets = [a.value for a in _written(func, refs, kwrefs, Ref)] if writes else []
            self._node(name, refs, kwrefs, inputs, made, self.stack[-1], macs, tuple(targets))
            if writes:
                self._spread_write(func, args, kwargs)
        else:
            for tensor in tensors:
                self._new(tensor, constant=True)
        return output

    def _spread_write(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """An in-place write reaches every tensor that shares the memory: give each a new value."""
        for tensor in _written(func, args, kwargs, Tensor):
            written = self._value(tensor)
            for other in list(self.by_storage.get(_storage(tensor), ())):
                if other is tensor:
                    continue
                if _geometry(other) == _geometry(tensor):
                    self._bind(other, written)
                else:
                    old = self._value(other)
                    index = len(self.graph.nodes)
                    new = self._new(other, index)
                    self._node("aliased_write", (), {}, (written, old), (new,), self.stack[-1])


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any], kind: type) -> list[Any]:
    """Return those arguments of ``kind`` that the operation writes into, by its schema."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        target = args[i] if i < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_leaves(target) if isinstance(leaf, kind)]
    return found


def _storage(tensor: Tensor) -> int:
    try:
        storage = tensor.untyped_storage()
        if isinstance(tensor, FakeTensor):  # it has memory to share, and nothing in it
            return int(storage._cdata)
        return storage.data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _macs(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    try:
        return int(formula(*args, **kwargs, out_val=output)) // 2
    except (TypeError, AssertionError, RuntimeError):
        return 0
