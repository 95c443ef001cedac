"""Exact accuracy in float32."""

from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from resconv.data import BatchLoader, ImageData
from resconv.inputs import evaluating

__all__ = ["evaluate"]


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
    # One process evaluates, while others may be waiting for it.
    metric = MulticlassAccuracy(data.num_classes, average="micro", sync_on_compute=False)
    metric = metric.to(device)
    with evaluating(model):
        for images, labels in loader:
            metric.update(model(images), labels)
    return 100 * float(metric.compute())
