"""Exact accuracy in float32, and BatchNorm recalibration."""

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from resconv.data import BatchLoader, ImageData
from resconv.trace import evaluating

__all__ = ["evaluate", "recalibrate"]


def evaluate(model: nn.Module, data: ImageData, *, batch_size: int = 500) -> float:
    """Return the top-1 accuracy on ``data.val``, in percent; the model is left as it was.

    Every image counts once, in float32.
    """
    device = next(model.parameters()).device
    loader = BatchLoader(
        data.val,
        batch_size,
        shuffle=False,
        seed=0,
        augment=None,
        mean=data.mean,
        std=data.std,
        device=device,
    )
    metric = MulticlassAccuracy(data.num_classes, average="micro").to(device)
    with evaluating(model):
        for images, labels in loader:
            metric.update(model(images), labels)
    return 100 * float(metric.compute())


def recalibrate(model: nn.Module, data: ImageData, *, batches: int = 50, seed: int = 0) -> None:
    """Collect the BatchNorm statistics anew from training images, in place; no labels are used."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    device = next(model.parameters()).device
    loader = BatchLoader(
        data.train,
        256,
        shuffle=True,
        seed=seed,
        augment=None,
        mean=data.mean,
        std=data.std,
        device=device,
    )
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over all batches
            norm.train()
        with torch.no_grad():
            for index, (images, _) in enumerate(loader):
                if index == batches:
                    break
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
