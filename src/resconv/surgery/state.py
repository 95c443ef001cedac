"""What every surgery asks of a model: a module in another's place, and numbers that can be compared."""

from torch import Tensor, nn

from ..errors import ResConvError

__all__ = ["require_finite", "set_submodule"]


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one at ``path``, under every name that it has."""
    old = model.get_submodule(path)
    # All places first: what comes may hold the old one inside it.
    places, seen, stack = [], {id(model)}, [model]
    while stack:
        parent = stack.pop()
        for name, child in parent._modules.items():
            if child is old:
                places.append((parent, name))
            elif child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)
    for parent, name in places:
        setattr(parent, name, module)


def require_finite(model: nn.Module, error: type[ResConvError]) -> None:
    """Raise ``error`` where a weight, scale or control is NaN or infinite: nothing can be compared.

    Buffers may hold infinities (a mask of them is sound), but no NaN.
    """
    bad = [n for n, p in model.named_parameters() if not _has_finite_sum(p)]
    bad = [n for n in bad if not bool(model.get_parameter(n).isfinite().all())]
    bad += [n for n, b in model.named_buffers() if bool(b.isnan().any())]
    if bad:
        raise error(
            f"{', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''} of {type(model).__name__} hold "
            "NaN or infinite numbers, so no outputs can be compared. If it was trained like "
            "this, the training diverged: lower the learning rate. Else load sound weights first."
        )


def _has_finite_sum(tensor: Tensor) -> bool:
    """Whether the sum of the entries is finite: then all are, found in one pass over them."""
    return bool(tensor.detach().sum().isfinite())
