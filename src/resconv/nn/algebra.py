"""ResConv -> ordinary conv: the algebra.

    y = s * (g / sigma * (W * x + b - mu) + beta) + p * x  =  W' * x + b'
    W' = s * g / sigma * W + p * Dirac        b' = s * (g / sigma * (b - mu) + beta)

``Dirac`` is 1 at one tap of the kernel, from input channel ``c`` of a group to its output channel
``c``. With a stride, or with other channels out than in, that is the identity strided, cut or
padded with zero channels.

Computed in float64 and rounded once to the layer's own type.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FusionError
from .gates import ResConv
from .geometry import tap

__all__ = ["add_identity", "fold_norm", "fused_kernel"]


def add_identity(weight: Tensor, scale: Tensor, where: tuple[int, ...], groups: int = 1) -> Tensor:
    """Return the kernel of ``x -> conv(x) + scale * x``; ``weight`` is left unchanged.

    Shape: (out, in / groups, *kernel). ``where`` is the tap that reads the output's own position;
    ``scale`` is one number or one an output channel.
    """
    channel = torch.arange(weight.shape[0], device=weight.device)
    # A grouped kernel sees its own group only: channel c is column c % width.
    column = channel % (weight.shape[0] // groups)
    there = column < weight.shape[1]
    fused = weight.clone()
    at: Any = (channel[there], column[there], *where)
    fused[at] += scale.expand(weight.shape[0])[there]
    return fused


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return ``(a, c)`` with ``norm(z) = a * z + c`` in eval mode, one a channel, in float64.

    Raises:
        FusionError: the norm is in training mode or has no running statistics.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.training or norm.running_mean is None or norm.running_var is None:
        why = "is in training mode" if norm.training else "keeps no running statistics"
        raise FusionError(
            f"A BatchNorm of {norm.num_features} channels {why}, so no fixed kernel equals it. "
            "Call model.eval() first."
        )
    a = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        a = a * norm.weight.detach().double()
    c = -a * norm.running_mean.detach().double()
    if norm.bias is not None:
        c = c + norm.bias.detach().double()
    return a, c


def fold_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return kernel and bias (float64) of the conv followed by the norm."""
    a, c = norm_affine(norm)
    weight = weight.detach().double() * a.reshape(-1, *[1] * (weight.ndim - 1))
    return weight, c if bias is None else c + a * bias.detach().double()


def fused_kernel(layer: ResConv) -> tuple[Tensor, Tensor | None]:
    """Return kernel and bias (float64) of the conv that equals ``layer`` in eval mode.

    Raises:
        FusionError: the layer's norm is in training mode.
    """
    conv = layer.conv
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    scale = layer.scale.detach().double()
    if layer.norm is not None:
        weight, bias = fold_norm(weight, bias, layer.norm)
    else:
        weight = weight.detach().double()
        bias = None if bias is None else bias.detach().double()
    where = tap(conv) if layer.reach is None else layer.reach.tap
    if where is None:
        raise FusionError("The layer's kernel has no tap at the output's own position.")
    assert layer.control is not None
    assert isinstance(conv.groups, int)
    control = layer.control.detach().double()
    weight = add_identity(weight * scale, control, where, conv.groups)
    return weight, None if bias is None else bias * scale
