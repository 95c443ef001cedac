"""What a trainer holds and what is meant: the converted net in its module, the right optimizer."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from resconv.analysis.inputs import unwrap
from resconv.errors import ConversionError
from resconv.nn.gates import gates
from resconv.surgery.provenance import is_converted

__all__ = ["find_converted", "find_optimizer"]


def find_converted(module: nn.Module, name: str | None = None) -> nn.Module:
    """Return the one converted net inside ``module`` (or the one called ``name``).

    Raises:
        ConversionError: there is none, or there are several.
    """
    found: dict[str, nn.Module] = {
        # Not a wrapper of it.
        path: m
        for path, m in module.named_modules()
        if unwrap(m) is m and is_converted(m)
    }
    if name is not None:
        if name not in found:
            raise ConversionError(
                f"net={name!r}: {type(module).__name__} has no converted net of that name"
                f"{'; it has ' + ', '.join(map(repr, found)) if found else ''}."
            )
        return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise ConversionError(
            f"{type(module).__name__} holds no converted net. Before training: "
            "net = resconv.convert(net, example_inputs)."
        )
    raise ConversionError(
        f"{type(module).__name__} holds {len(found)} converted nets ({', '.join(found)}). Say "
        "which one is trained: SparsityCallback(..., net=NAME)."
    )


def find_optimizer(net: nn.Module, optimizers: Iterable[Optimizer]) -> Optimizer:
    """Return the optimizer that holds the scales (the last, whose refusal says why, if none does)."""
    optimizer = None
    scales = {id(gate.scale) for gate in gates(net).values()}
    for optimizer in optimizers:
        if any(id(p) in scales for g in optimizer.param_groups for p in g["params"]):
            return optimizer
    if optimizer is None:
        raise ConversionError("The training loop has no optimizer, so no step to follow.")
    return optimizer
