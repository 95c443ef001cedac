"""The training form: a scale on every unit, and a shortcut where there was none.

    layer   y = s * N(C(x)) + p * x      s: ``scale``, p: ``control``
    block   y = s * F(x) + x             the shortcut is the block's own
    summand y = a + s * b                of a sum, whose other side is no identity
    segment y = K(x) + s * (F(x) - K(x)) K: one conv (or a depthwise and a 1x1) of F's shape
    gate    y = x + s * (x * g(x) - x)   of a squeeze-and-excite and its kin; where the product is
                                         outside of what computes g, x * (1 + s * (g - 1))
    fixed   y = s * N(C(x)) + p * I(x)   a layer that changes the shape: ``I`` strides, crops, drops
                                         channels or pads them with 0. It fuses just as well, but
                                         s = 0 leaves no identity, so the layer stays; s is fixed.

A unit whose scale stays at 0 need not be computed while the rest is trained: see ``Gate.skipped``.

``s`` multiplies the norm's weight and bias before the norm runs (same function, one pass over the
activations less). ``p * x`` is one fused pass forward, and in the backward pass the gradient of
``p`` is a dot product, so nothing the size of an activation is kept for it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ..errors import ConversionError
from .geometry import Reach

__all__ = [
    "Blend",
    "BranchGate",
    "FactorGate",
    "Gate",
    "Multiply",
    "ResConv",
    "Segment",
    "Soften",
    "copy_zeros",
    "gates",
    "is_leaf",
    "kept",
    "zeroed",
]


class _AddScaled(torch.autograd.Function):
    """``z + p * x``, written into ``z``; the gradient of the scalar ``p`` is one dot product.

    Neither a norm nor a product needs its own output in the backward pass, so ``z`` may be reused.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, p: Tensor) -> Tensor:
        # On the CPU the value is at hand; elsewhere asking for it would wait for the device.
        at_hand = p.device.type == "cpu" and not isinstance(z, FakeTensor)
        ctx.closed = at_hand and p.item() == 0
        ctx.save_for_backward(x, p)
        ctx.mark_dirty(z)
        if not ctx.closed:
            z.addcmul_(x.to(z.dtype), p.to(z.dtype))
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, p = ctx.saved_tensors
        grad_x = None
        # A second derivative depends on p at 0, too.
        if ctx.needs_input_grad[1] and (not ctx.closed or torch.is_grad_enabled()):
            grad_x = (grad * p.to(grad.dtype)).to(x.dtype)
        grad_p = None
        if ctx.needs_input_grad[2]:
            a, b = _in_memory_order(grad, x)
            # Accumulated in float32 (float64 for float64): bf16 has 8 bits for a sum of millions.
            wide = torch.promote_types(torch.float32, p.dtype)
            grad_p = torch.linalg.vecdot(a, b).to(wide).sum().to(p.dtype)
        return grad, grad_x, grad_p


class _Zeros(torch.autograd.Function):
    """Zeros that hang on a parameter, without a gradient for it.

    A checkpoint that runs its part again in the backward pass (``use_reentrant=True``) demands an
    output that requires a gradient.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _in_memory_order(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """View both as rows of the first dimension, without a copy when their layouts agree."""
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    if a.dim() == 4 and b.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)


class Gate(nn.Module):
    """A unit that can be removed: ``scale`` decides, ``control`` weighs our own shortcut.

    ``skipped`` says that nothing depends on what the unit computes: its scale is held at 0, or it
    lies inside a branch whose scale is. In training mode its layers then do not run, in the forward
    or the backward pass. Outputs and all other gradients are the same; its own parameters get none.
    """

    scale: nn.Parameter
    control: nn.Parameter | None
    unit: str = ""
    reason: str | None = None  # why it cannot be removed
    skipped: bool = False
    waiting: bool = False  # whether the scale is held at 1 for now

    @property
    def removable(self) -> bool:
        return self.reason is None

    def __getattr__(self, name: str) -> Any:
        """Fall through to the wrapped layer: code of the net that reads from it goes on working."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Special methods are about this object: how to copy it, how to pickle it.
            inner = self.__dict__.get("_modules", {})
            layer = inner.get("conv", inner.get("module"))
            if layer is None or (name.startswith("__") and name.endswith("__")):
                raise
            try:
                return getattr(layer, name)
            except AttributeError:
                raise AttributeError(
                    f"{type(self).__name__!r} object has no attribute {name!r}, nor has the "
                    f"{type(layer).__name__} in it"
                ) from None

    def _rests(self) -> bool:
        # Compiled code runs everything: it would be compiled anew for each set of skipped units.
        return not torch.compiler.is_compiling() and self.skipped and self.training

    def _apply(self, fn: Any, recurse: bool = True) -> "Gate":
        # ``model.bfloat16()`` too leaves the scalars in float32: bf16 cannot hold their small steps.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for scalar in (self.scale, self.control):
            if scalar is not None and scalar.element_size() < 4:
                scalar.data = scalar.data.float()
        return self

    def extra_repr(self) -> str:
        control = "" if self.control is None else f", control={self.control.item():.4g}"
        return f"scale={self.scale.item():.4g}{control}"


def _scaled_norm(norm: nn.Module, z: Tensor, scale: Tensor) -> Tensor:
    """Run a BatchNorm with its weight and bias multiplied by ``scale``."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    weight: Tensor | None = norm.weight
    if weight is None:
        return norm(z) * scale.to(z.dtype)  # type: ignore[no-any-return]
    use_batch = norm.training or norm.running_mean is None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return F.batch_norm(
        z,
        norm.running_mean if not norm.training or norm.track_running_stats else None,
        norm.running_var if not norm.training or norm.track_running_stats else None,
        weight * scale,
        norm.bias * scale,
        use_batch,
        momentum,
        norm.eps,
    )


def _dtype_of_ops(x: Tensor) -> torch.dtype:
    """Return the type in which a conv would compute here."""
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def is_plain_norm(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm whose forward is torch's own."""
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _takes_scale(module: nn.Module) -> bool:
    """Whether a scale can go into the module's own weight and bias."""
    return is_plain_norm(module) and getattr(module, "weight", None) is not None


class ResConv(Gate):
    """``y = scale * norm(conv(x)) + control * x`` (arXiv 2011.14356; see docs/method.md).

    Shapes: x and y are (N, C, *spatial); ``scale`` and ``control`` are scalars. With ``reach`` the
    conv changes the shape, and so does the shortcut.
    """

    def __init__(
        self,
        conv: nn.Module,
        norm: nn.Module | None,
        scale: float = 1.0,
        control: float = 0.0,
        reach: Reach | None = None,
    ) -> None:
        super().__init__()
        assert norm is None or is_plain_norm(norm)
        like = conv.weight
        assert isinstance(like, Tensor)
        # Scalars stay in float32 at least: bf16 cannot hold the small steps of the proximal update.
        dtype = torch.promote_types(torch.float32, like.dtype)
        # The scalars first: the conv may have attributes of these names.
        self.scale = nn.Parameter(torch.tensor(scale, dtype=dtype, device=like.device))
        self.control = nn.Parameter(torch.tensor(control, dtype=dtype, device=like.device))
        self.conv = conv
        self.norm = norm
        self.reach = reach
        self.scale.requires_grad_(reach is None)
        # Its own flag only: a norm that the user froze in eval mode stays frozen.
        self.training = conv.training

    def forward(self, x: Tensor) -> Tensor:
        if self._rests():
            assert self.control is not None
            zero = torch.zeros_like(x, dtype=_dtype_of_ops(x))
            return _AddScaled.apply(zero, x, self.control)  # type: ignore[no-any-return]
        z = self.conv(x)
        if self.norm is None:
            z = z * self.scale.to(z.dtype)
        elif is_plain_norm(self.norm):
            z = _scaled_norm(self.norm, z, self.scale)
        else:  # a SyncBatchNorm since the conversion: its forward talks to the other processes
            z = self.norm(z) * self.scale.to(z.dtype)
        assert self.control is not None
        if self.reach is not None:
            x = self.reach(x, self.conv, z.shape[2:])
        return _AddScaled.apply(z, x, self.control)  # type: ignore[no-any-return]


class Multiply(nn.Module):
    """Multiplies a branch by its scale; one node in a record."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale.to(x.dtype)


class BranchGate(Gate):
    """``scale`` times what ``module``, the last layer of a residual branch, returns."""

    def __init__(self, module: nn.Module, scale: float = 1.0, like: Tensor | None = None) -> None:
        super().__init__()
        own = next((p for p in module.parameters() if p.is_floating_point()), None)
        like = like if own is None else own  # an activation has no type or device of its own
        dtype = torch.float32 if like is None else torch.promote_types(torch.float32, like.dtype)
        device = None if like is None else like.device
        # The scalars first: the module may have attributes of these names.
        self.scale = nn.Parameter(torch.tensor(scale, dtype=dtype, device=device))
        self.control = None
        self.module = module
        self.multiply = Multiply()
        self.training = self.multiply.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._rests():
            # Whatever made the branch is left out of the backward pass.
            with torch.no_grad():
                plain = is_plain_norm(self.module)
                like = args[0] if plain else self.module(*args, **kwargs)
            return _Zeros.apply(self.scale, like)
        if _takes_scale(self.module):
            return _scaled_norm(self.module, args[0], self.scale)
        return self.multiply(self.module(*args, **kwargs), self.scale)


class Soften(nn.Module):
    """``1 + scale * (g - 1)``, exact at 0 and at 1; one node in a record."""

    def forward(self, g: Tensor, scale: Tensor) -> Tensor:
        return torch.lerp(torch.ones_like(g), g, scale.to(g.dtype))


class FactorGate(BranchGate):
    """``1 + scale * (g - 1)`` of the factor ``g`` that ``module`` returns; in the net to be shipped 1 or g."""

    def __init__(self, module: nn.Module, scale: float = 1.0, like: Tensor | None = None) -> None:
        super().__init__(module, scale, like)
        del self.multiply
        self.soften = Soften()
        self.soften.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._rests():
            with torch.no_grad():
                return torch.ones_like(self.module(*args, **kwargs))
        return self.soften(self.module(*args, **kwargs), self.scale)


class Blend(nn.Module):
    """``left + scale * (whole - left)``, exact at 0 and at 1; one node in a record."""

    def forward(self, whole: Tensor, left: Tensor, scale: Tensor) -> Tensor:
        return torch.lerp(left.to(whole.dtype), whole, scale.to(whole.dtype))


class Segment(Gate):
    """``y = left(x) + scale * (module(x) - left(x))``: what is there at 1, what is left at 0.

    The shortcut's weight is ``1 - scale``, so it starts at 0, and where the scale ends at 0 it is
    exactly 1: nothing of it has to be absorbed. ``left`` is a few ordinary layers of the module's
    shape, or an identity where a module only multiplies its input by a gate of its own. In the net
    that is shipped such a unit is there whole or not at all: a scale between 0 and 1 leaves both
    sides in it.

    ``waiting`` says that the scale is held at 1: no gradient reaches ``left`` then, and nothing of it
    is kept for the backward pass. ``residual`` is the share of the module's variance that ``left`` does
    not explain, as it was fitted; None where it was not.
    """

    def __init__(
        self, module: nn.Module, left: nn.Module, scale: float = 1.0, like: Tensor | None = None
    ) -> None:
        super().__init__()
        own = next((p for p in module.parameters() if p.is_floating_point()), None)
        like = like if own is None else own
        dtype = torch.float32 if like is None else torch.promote_types(torch.float32, like.dtype)
        device = None if like is None else like.device
        self.scale = nn.Parameter(torch.tensor(scale, dtype=dtype, device=device))
        self.control = None
        self.module = module
        self.left = left
        self.blend = Blend()
        self.residual: float | None = None
        self.training = self.blend.training = module.training

    @property
    def kind(self) -> str:
        """Return "gate" where the input itself is left, else "segment"."""
        return "gate" if isinstance(self.left, nn.Identity) else "segment"

    def forward(self, x: Tensor) -> Tensor:
        if self._rests():
            return self.left(x)  # type: ignore[no-any-return]
        if self._is_closed():
            # No gradient reaches it, so nothing of it is kept.
            with torch.no_grad():
                left = self.left(x)
        else:
            left = self.left(x)
        return self.blend(self.module(x), left, self.scale)  # type: ignore[no-any-return]

    def _is_closed(self) -> bool:
        if self.kind == "gate" or torch.compiler.is_compiling():
            return False
        # The reduction of gradients over several processes waits for every parameter.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return False
        # On the CPU the value is at hand; elsewhere asking for it would wait for the device.
        return self.waiting or (self.scale.device.type == "cpu" and self.scale.item() == 1)


def is_leaf(module: nn.Module) -> bool:
    """Whether a record shows this module as one ``gate`` node."""
    if isinstance(module, BranchGate):
        return _takes_scale(module.module) and not isinstance(module, FactorGate)
    return isinstance(module, ResConv | Multiply | Blend | Soften)


def gates(model: nn.Module, *, fixed: bool = False) -> dict[str, Gate]:
    """Return ``{name: gate}`` of a converted model, in the order of its modules.

    Each gate has ``scale`` and, where the shortcut is ours, ``control`` (else None). With ``fixed``
    those that cannot be removed are there as well; their ``reason`` says why.

    Example:
        >>> model = resconv.convert(net, images)
        >>> {name: gate.scale.item() for name, gate in resconv.gates(model).items()}
        {'0': 1.0, '3': 1.0, '6': 1.0}
    """
    every = {m.unit or n: m for n, m in model.named_modules() if isinstance(m, Gate)}
    return {n: gate for n, gate in every.items() if fixed or gate.removable}


@torch.no_grad()
def copy_zeros(source: nn.Module, target: nn.Module) -> None:
    """Set every scale of ``target`` to exactly 0 whose namesake in ``source`` is 0.

    An average over training (EMA, SWA) of a scale that arrived at 0 is small and never 0. Call
    this after each update of the average, ``copy_zeros(model, ema.module)``, and the averaged net
    holds the same zeros as the trained one. Nothing else in ``target`` changes.

    Raises:
        ConversionError: ``target`` lacks a unit of ``source``.

    Example:
        >>> model = resconv.convert(net, images)
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> _ = torch.nn.init.zeros_(resconv.gates(model)["3"].scale)
        >>> average.update_parameters(model)
        >>> resconv.copy_zeros(model, average.module)
        >>> resconv.gates(average.module)["3"].scale.item()
        0.0
    """
    others = gates(target)
    every = gates(source)
    missing = [name for name in every if name not in others]
    if missing or not every:
        raise ConversionError(
            f"The averaged net has no unit named {', '.join(map(repr, missing[:5]))}. Make the "
            "average from the converted model (ModelEmaV3(model), AveragedModel(model))."
            if missing
            else "The source has no gates. Call resconv.convert(model, example_inputs) first."
        )
    for name, gate in every.items():
        scale = others[name].scale
        scale.mul_((gate.scale != 0).to(scale.device, scale.dtype))


@contextmanager
def kept(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Put the parameters' values back after the block, whatever was written into them."""
    before = [(p, p.detach().clone()) for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@contextmanager
def zeroed(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Set the named scales to exactly 0 for the time of the block."""
    every = gates(model)
    scales = [every[name].scale for name in names]
    with kept(scales):
        with torch.no_grad():
            for scale in scales:
                scale.zero_()
        yield
