"""Processes that train one net together: decisions are the first one's, and scales are compared.

DistributedDataParallel averages the gradients, so every process takes the same steps; what is
measured or decided on the host is sent, so that it cannot differ.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed, nn

__all__ = ["are_several", "by_first", "differing_ranks", "from_first", "is_shared"]

T = TypeVar("T")


def are_several() -> bool:
    """Whether there is a process group of more than one."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def is_shared(model: nn.Module) -> bool:
    """Whether several processes train this model together."""
    return are_several() and isinstance(model, nn.parallel.DistributedDataParallel)


def from_first(value: T) -> T:
    """Return the first process's value (anything that pickles) on all of them."""
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def by_first(call: Callable[[], T], shared: bool) -> T:
    """Let the first process call for all, and give every one what it returned (or its error).

    Not ``shared``, every process calls by itself.
    """
    if not shared:
        return call()
    found: tuple[T | None, Exception | None] = (None, None)
    if distributed.get_rank() == 0:
        try:
            found = (call(), None)
        except Exception as error:  # raised again, on every process
            found = (None, error)
    value, failure = from_first(found)
    if failure is not None:
        raise failure
    return cast(T, value)


def differing_ranks(values: Tensor) -> list[int]:
    """Return the ranks whose values are not bit by bit the first one's; the same on all ranks."""
    values = values.detach()
    first = values.clone()
    distributed.broadcast(first, src=0)
    same = ((first == values) | (first.isnan() & values.isnan())).all()
    flags = torch.zeros(distributed.get_world_size(), device=values.device)
    flags[distributed.get_rank()] = 1 - same.float()
    distributed.all_reduce(flags)
    return [int(r) for r in flags.nonzero().flatten().tolist()]
