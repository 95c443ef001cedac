"""BatchNorm statistics, collected anew: a forward pass over training inputs, no labels.

Statistics downstream of a removed unit were collected while it was there. Where its scale was not 0
they no longer fit, and most of the accuracy that seems lost is lost to that alone.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.inputs import copied, unwrap
from ..errors import DataError

__all__ = ["recalibrate", "run_batch"]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Collect every BatchNorm's running statistics anew, in place; return how many batches it took.

    The statistics become the plain average over all batches. Weights, modes (train or eval),
    momenta and gradients stay as they were, and so does everything if a batch fails.

    Args:
        model: converted, pruned or ordinary. A net whose norms are folded has none to collect.
        batches: a DataLoader or any iterable. A tensor is the model's input; of a tuple or list the
            first entry is (the labels after it are not used); a dict holds keyword arguments.
        call: runs the model on one batch, where ``batches`` holds something else:
            ``call=lambda model, batch: model(batch["pixel_values"])``.

    Raises:
        DataError: there is no batch, a batch is of another kind, or the new statistics are not
            finite.

    Example:
        >>> resconv.recalibrate(net, [torch.randn(8, 4, 6, 6) for _ in range(3)])
        3
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    modes = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    before = [{k: b.clone() for k, b in m.named_buffers()} for m in norms]
    device = next((p.device for p in unwrap(model).parameters()), torch.device("cpu"))
    run = call or (lambda net, batch: run_batch(net, batch, device))
    taken = 0
    done = False
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over all batches
            norm.train()
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
                taken += 1
        if not taken:
            raise DataError("There is no batch to collect BatchNorm statistics from.")
        _check(model, norms)
        done = True
    finally:
        for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not done:
                for name, value in buffers.items():
                    norm.get_buffer(name).copy_(value)
        for module, mode in modes:
            module.training = mode
    return taken


def run_batch(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """Return what the model makes of one batch, as a DataLoader hands it out.

    Raises:
        DataError: it is no tensor, no tuple that begins with one, and no dict.
    """
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    batch = copied(batch)  # a net may write into its input
    if isinstance(batch, Tensor):
        return model(batch.to(device, non_blocking=True))
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    raise DataError(
        f"A batch is a {type(batch).__name__}; give tensors, tuples that begin with the input, or "
        "dicts of keyword arguments, or say with call= how the model runs on a batch."
    )


def _check(model: nn.Module, norms: list[Any]) -> None:
    for norm in norms:
        if not bool(
            torch.isfinite(norm.running_mean).all() & torch.isfinite(norm.running_var).all()
        ):
            name = next(n for n, m in model.named_modules() if m is norm)
            raise DataError(
                f"The new statistics of {name} are not finite: an input or a weight before it "
                "is NaN or infinite. The old ones were put back."
            )
