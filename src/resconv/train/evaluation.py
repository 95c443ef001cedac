"""Exact accuracy in float32."""

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from resconv.analysis.inputs import evaluating
from resconv.data import BatchLoader, ImageData

__all__ = ["evaluate"]


def evaluate(model: nn.Module, data: ImageData, *, batch_size: int = 500) -> float:
    """Return the top-1 accuracy on ``data.val``, in percent; the model is left as it was.

    Every image counts once, in float32. A model on the CPU is judged on the GPU where there is one.
    """
    home = next(model.parameters()).device
    device = torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home
    loader = BatchLoader(data.val, batch_size, data.preprocessing, device=device)
    # One process evaluates, while others may be waiting for it.
    metric = MulticlassAccuracy(data.num_classes, average="micro", sync_on_compute=False)
    metric = metric.to(device)
    model.to(device)
    try:
        # TF32, torch's default for convs on GPUs, has 10 bits.
        with evaluating(model), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for images, labels in loader:
                metric.update(model(images), labels)
    finally:
        model.to(home)
    return 100 * float(metric.compute())
