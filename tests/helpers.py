"""Random networks with statistics that are not those of a fresh net."""

import torch
from torch import nn

import resconv

__all__ = ["randomise", "randomise_gates", "some_plan"]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm (and LayerNorm) random weights and statistics."""
    gen = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            size = m.running_mean.shape
            m.running_mean.copy_(0.3 * torch.randn(size, generator=gen))
            m.running_var.copy_(0.5 + 1.5 * torch.rand(size, generator=gen))
        if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            with torch.no_grad():
                if m.weight is not None:
                    m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=gen))
                if m.bias is not None:
                    m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=gen))
    return model.eval()


def randomise_gates(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every scale and control a value in [0.5, 1.5]."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in resconv.gates(model).values():
            gate.scale.fill_(0.5 + float(torch.rand((), generator=gen)))
            if gate.control is not None:
                gate.control.fill_(0.5 + float(torch.rand((), generator=gen)))
    return model


def some_plan(model: nn.Module, seed: int = 0, share: float = 0.5) -> resconv.Plan:
    """Return a plan with a random share of the units (at least one)."""
    gen = torch.Generator().manual_seed(seed)
    names = list(resconv.gates(model))
    chosen = [n for n in names if float(torch.rand((), generator=gen)) < share]
    return resconv.Plan(tuple(chosen or names[:1]))
