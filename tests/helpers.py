"""Random networks with statistics that are not those of a fresh net."""

from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import resconv
from resconv.analysis.candidates import compatible
from resconv.analysis.inputs import as_call, evaluating
from resconv.analysis.ops import NORMS
from resconv.planning.costs import cost_model
from resconv.preprocessing import Preprocessing
from resconv.surgery.edit_kinds import Edit
from resconv.surgery.provenance import example_inputs_of, provenance_of

__all__ = [
    "RGB",
    "VARIANCES",
    "Block",
    "edits_read_again",
    "randomise",
    "randomise_gates",
    "settle",
    "some_plan",
]

VARIANCES = (1.0, 4.0)  # by what factors settled variances move

RGB = Preprocessing(
    size=16,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.1),
    channel_order="RGB",
    class_names=tuple("abcde"),
)


class Block(nn.Module):
    """A residual block of two convs."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def edits_read_again(model: nn.Module) -> tuple[Edit, ...]:
    """Return what was changed in the net's tree, as a file gives it back."""
    text = msgspec.json.encode(provenance_of(model).edits)
    return msgspec.json.decode(text, type=tuple[Edit, ...])


def randomise(model: nn.Module, seed: int = 0, example_inputs: Any = None) -> nn.Module:
    """Give every BatchNorm (and LayerNorm, GroupNorm) random weights, and random statistics.

    Parameters that start as one constant (layer scales of 1e-6, gains of 0, zero kernels) become
    random too: a branch that is multiplied by next to nothing would prove nothing.

    With ``example_inputs`` the statistics are random around those of the norm's own input (see
    :func:`settle`); without, they know nothing of it, which only shallow nets survive in float32.
    """
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
    for name, p in model.named_parameters():
        _fill_constant(name, p, gen)
    if example_inputs is not None:
        settle(model, example_inputs, seed)
    return model.eval()


def _fill_constant(name: str, p: Tensor, gen: torch.Generator) -> None:
    if not p.numel() or not p.is_floating_point() or not bool((p == p.flatten()[0]).all()):
        return
    with torch.no_grad():
        random = torch.rand(p.shape, generator=gen).to(p.dtype)
        if name.endswith("bias"):
            p.copy_(0.2 * (random - 0.5))
        elif max(p.shape, default=1) == p.numel():  # one number a channel, or one in all
            p.copy_(0.5 + random)
        else:
            p.copy_((random - 0.5) * (12 / p[0].numel()) ** 0.5)


def settle(model: nn.Module, example_inputs: Any, seed: int = 0) -> nn.Module:
    """Set each BatchNorm's statistics to those of its input, moved at random by a good margin.

    The means move by half a standard deviation, the variances by a factor in ``VARIANCES``: nothing
    cancels, and yet activations stay of one size through any depth. Statistics that are random
    alone multiply them at every norm, and a net of 300 layers then magnifies float32's rounding
    itself beyond any tolerance. So does a random net with its exact statistics, by about 1.2 a layer
    (Yang et al. 2019, arXiv 1902.08129), which is why the variances move
    upwards only. One forward pass on ``example_inputs`` and three random ones.
    """
    gen = torch.Generator().manual_seed(seed)

    def batch(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        more = torch.randn((3 * t.shape[0], *t.shape[1:]), generator=gen).to(t.dtype)
        return torch.cat([t, more])

    args, kwargs = as_call(tree_map(batch, example_inputs))
    with evaluating(model), _Settling(gen):
        model(*args, **kwargs)
    return model


class _Settling(TorchDispatchMode):
    """Writes a norm's statistics right before it runs, whichever module calls it."""

    def __init__(self, gen: torch.Generator) -> None:
        super().__init__()
        self.gen = gen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name.split("::")[-1] in NORMS and isinstance(args[3], Tensor):
            x, mean, var = args[0], args[3], args[4]
            rows = x.transpose(0, 1).flatten(1)
            # A random net maps all inputs to nearly one: dividing by that small spread would
            # magnify rounding from norm to norm, so the spread counts as half the size.
            own = rows.var(1, correction=0).clamp_min(0.25 * rows.square().mean() + 1e-6)
            random = torch.randn(len(own), generator=self.gen).to(own.dtype)
            mean.copy_(rows.mean(1) + 0.5 * own.sqrt() * random)
            low, high = VARIANCES
            factor = low * (high / low) ** torch.rand(len(own), generator=self.gen)
            var.copy_(own * factor.to(own.dtype))
        return func(*args, **(kwargs or {}))


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
    """Return a plan with a random share of the units (at least one) that can go together."""
    gen = torch.Generator().manual_seed(seed)
    names = list(resconv.gates(model))
    chosen = [n for n in names if float(torch.rand((), generator=gen)) < share]
    excluded = cost_model(model, example_inputs_of(None, model)).excluded
    return resconv.Plan(compatible(chosen or names[:1], excluded))
