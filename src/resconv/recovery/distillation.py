"""Losses that follow a teacher: its logits (Hinton, Vinyals, Dean 2015, arXiv 1503.02531), its hints."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ModelError

__all__ = ["distillation_loss", "hint_loss"]


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0
) -> Tensor:
    """Return how far the class probabilities are from the teacher's: a scalar loss, 0 where equal.

    ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over the batch. ``T^2`` keeps the
    size of the gradient the same at every temperature, so the loss can be weighed against cross-
    entropy once: ``0.5 * F.cross_entropy(logits, labels) + 0.5 * distillation_loss(logits, teacher(images))``.
    The gradient goes into ``logits`` alone. It is computed in float32 at least.

    Shape: both (N, classes) or (N, classes, *spatial) -> ().

    Example:
        >>> logits = net(images)
        >>> resconv.recovery.distillation_loss(logits, logits).item()
        0.0
    """
    if logits.shape != teacher_logits.shape:
        raise ModelError(
            f"The student's logits have shape {tuple(logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}: both must tell the same classes apart, on one batch."
        )
    if not temperature > 0:
        raise ModelError(f"temperature={temperature!r}: give a number above 0.")
    student = F.log_softmax(_wide(logits) / temperature, 1)
    teacher = F.log_softmax(_wide(teacher_logits.detach()) / temperature, 1)
    each = F.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
    return each.mean() * temperature**2


def hint_loss(inputs: tuple[Tensor, ...], teacher_inputs: tuple[Tensor, ...]) -> Tensor:
    """Return how far tensors are from the teacher's: a scalar loss, 0 where equal, 1 where all are 0.

    They are what :class:`resconv.recovery.FeatureTap` returns. For each pair the mean of the squared difference
    over the mean of the teacher's square; of those, the mean. The gradient goes into ``inputs`` alone.
    It is computed in float32 at least.

    Raises:
        ModelError: there are no tensors, or the shapes differ.

    Example:
        >>> features = (torch.randn(2, 4), torch.randn(2, 8))
        >>> resconv.recovery.hint_loss(features, features).item()
        0.0
    """
    mine, theirs = ([tuple(t.shape) for t in each] for each in (inputs, teacher_inputs))
    if not inputs or mine != theirs:
        raise ModelError(
            f"The student's tensors have shapes {mine}, the teacher's {theirs}: at least one, "
            "and the same ones, are needed. Watch the same layers in both, on one batch."
        )
    losses = []
    for student, teacher in zip(inputs, teacher_inputs, strict=True):
        wanted = _wide(teacher.detach())
        # Where the teacher has nothing but zeros there is no scale to compare with.
        size = wanted.square().mean().clamp_min(torch.finfo(wanted.dtype).tiny)
        losses.append(F.mse_loss(_wide(student), wanted) / size)
    return torch.stack(losses).mean()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()
