"""In-place operations that a removal would turn against a value that is still needed.

A conv writes its output to fresh memory, so the activation behind it may write in place. With the
conv gone that memory is the conv's input, which a shortcut may read later.
"""

from collections.abc import Callable

from ..analysis.graph import Node
from ..errors import PruneError
from .decisions import Surgery

__all__ = ["unsafe_writes"]

_SHARES_MEMORY = {
    "alias",
    "as_strided_",
    "chunk",
    "detach",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_unsafe_view",
}


def unsafe_writes(
    todo: Surgery, identities: list[str], covered: set[int]
) -> tuple[list[str], set[str]]:
    """Return the activations to be made out-of-place, and the identities that have to copy.

    Raises:
        PruneError: neither is possible.
    """
    graph = todo.graph
    memory: dict[int, int] = {}

    def home(value: int) -> int:
        return memory.get(value, value)

    writes: list[Node] = []
    for node in graph.nodes:
        if node.index in todo.dead or not node.inputs or not node.outputs:
            continue
        if node.index in todo.bypassed:
            source = node.inputs[todo.bypassed[node.index]]
        elif node.op in _SHARES_MEMORY or _writes(node):
            source = node.inputs[0]
        else:
            continue
        for value in node.outputs:
            memory[value] = home(source)
        if _writes(node) and node.index not in todo.bypassed and node.index not in covered:
            writes.append(node)
    outplace: list[str] = []
    cloned: set[str] = set()
    joined = {home(v) for v in todo.same_as}
    for node in writes:
        # Elsewhere the model's own writes are as safe as they were.
        if home(node.inputs[0]) not in joined:
            continue
        if not _still_read(todo, node, home(node.inputs[0]), home):
            continue
        module = node.call.module
        if getattr(module, "inplace", None) is True:
            if node.call.path not in outplace:
                outplace.append(node.call.path)
            continue
        path = _identity_before(todo, node, identities)
        if path is None:
            raise PruneError(
                f"In {node.call.path or 'the model'} the operation {node.op} writes in place into "
                "a value that is still needed once the unit before it is gone. Use the "
                "out-of-place operation there, or leave the unit out of the plan."
            )
        cloned.add(path)
    return outplace, cloned


def _writes(node: Node) -> bool:
    return node.op.endswith("_") and node.op not in _SHARES_MEMORY and not node.op.endswith("__")


def _still_read(todo: Surgery, write: Node, memory: int, home: Callable[[int], int]) -> bool:
    """Whether memory of an older value is read after the write."""
    graph = todo.graph
    for value in graph.values[: max(write.outputs)]:
        if home(value.index) != memory:
            continue
        if value.index in graph.outputs:
            return True
        for reader in graph.users.get(value.index, []):
            if reader.index > write.index and reader.index not in todo.dead:
                return True
    return memory in graph.inputs


def _identity_before(todo: Surgery, node: Node, identities: list[str]) -> str | None:
    graph = todo.graph
    value = node.inputs[0]
    while (maker := graph.producer(value)) is not None:
        if maker.index in todo.bypassed:
            for call in graph.calls:
                if call.path in identities and call.start <= maker.index < call.end:
                    return call.path
        if not maker.inputs or (maker.index not in todo.bypassed and not _passes(maker)):
            return None
        value = maker.inputs[todo.bypassed.get(maker.index, 0)]
    return None


def _passes(node: Node) -> bool:
    return node.op in _SHARES_MEMORY or _writes(node)
