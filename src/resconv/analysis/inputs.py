"""The user's model and example inputs, taken as they come: wrappers, arguments, devices, batch size."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import TraceError

__all__ = [
    "as_batch",
    "as_call",
    "batch_size",
    "copied",
    "evaluating",
    "tensors_in",
    "to_device_of",
    "unwrap",
]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside DataParallel, DDP or ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that ``example_inputs`` stands for.

    A tensor is the one argument, a tuple or list the positional ones, a dict the keyword ones. The
    tensors are copies: a net may write into its input, and the next run has to see the same one.
    """
    example_inputs = copied(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise TraceError(
        f"example_inputs is a {type(example_inputs).__name__}; "
        "give a tensor, a tuple of arguments or a dict of keyword arguments."
    )


def copied(tree: Any) -> Any:
    """Return the tree with a copy of every tensor in it; one tensor in two places stays one."""
    made: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf.detach().clone()
        return made[id(leaf)]

    return tree_map(copy, tree)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return every tensor of a nested structure: what pytrees know, and the fields of objects."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def look(tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif isinstance(leaf, type | Enum | nn.Module) or callable(leaf):
                continue
            elif hasattr(leaf, "__dict__") and id(leaf) not in seen:
                seen.add(id(leaf))
                look(list(vars(leaf).values()))

    look(tree)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, without gradients, and restore each one's own mode after.

    A forward that draws random numbers in eval mode (noise on a variance, say) gets the same ones every
    time, so that two nets can be compared; the generators are left as they were.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    state = random.getstate()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(0)
            for index in devices:
                torch.cuda.default_generators[index].manual_seed(0)
            random.seed(0)
            yield
    finally:
        random.setstate(state)
        for module, mode in modes:
            module.training = mode


def to_device_of(model: nn.Module, example_inputs: Any) -> Any:
    """Move example tensors to the model's device.

    Floats go to the dtype that most of its parameters have, unless one of them has it already: then
    the others differ on purpose (a time stamp in double precision beside an image) and are kept.
    """
    floats = [p for p in model.parameters() if p.is_floating_point()]
    if not floats:
        return example_inputs
    # Scalars of gates, and some norms, stay in float32 in a net of half precision.
    sizes = Counter[torch.dtype]()
    for p in floats:
        sizes[p.dtype] += p.numel()
    first, usual = floats[0], sizes.most_common(1)[0][0]
    fits = any(isinstance(t, Tensor) and t.dtype == usual for t in tree_leaves(example_inputs))

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        casts = leaf.is_floating_point() and not fits
        return leaf.to(first.device, usual if casts else None)

    return tree_map(move, example_inputs)


def batch_size(example_inputs: Any) -> int:
    """Return the first dimension of the first example tensor (1 when it has none).

    Where the model takes a list of images (C, H, W), it is the number of images.
    """
    args, kwargs = as_call(example_inputs)
    for argument in (*args, *kwargs.values()):
        if _is_list_of_images(argument):
            return len(argument)
        tensors = [t for t in tree_leaves(argument) if isinstance(t, Tensor)]
        if tensors:
            return int(tensors[0].shape[0]) if tensors[0].ndim else 1
    return 1


def _is_list_of_images(argument: Any) -> bool:
    return (
        isinstance(argument, list | tuple)
        and bool(argument)
        and all(isinstance(t, Tensor) and t.ndim == 3 and t.is_floating_point() for t in argument)
    )


def as_batch(example_inputs: Any, size: int) -> Any:
    """Repeat (or cut) the example tensors, or a list of images, to another batch size.

    Tensors whose first dimension is not the batch stay as they are.
    """
    batch = batch_size(example_inputs)

    def repeat(t: Any) -> Any:
        if t is not example_inputs and _is_list_of_images(t):
            return type(t)(t[i % batch].clone() for i in range(size))
        if not isinstance(t, Tensor) or not t.ndim or t.shape[0] != batch:
            return t
        return t[torch.arange(size) % batch].clone()

    return tree_map(
        repeat, example_inputs, is_leaf=lambda t: t is not example_inputs and _is_list_of_images(t)
    )
