"""The layers that may come in the place of a segment, as plain data, and built from it.

    dense      one conv, k x k
    pointwise  one conv, 1 x 1
    separable  a depthwise conv, k x k, and a 1 x 1 behind it

with the segment's stride, a BatchNorm behind them where the segment has one, and the activation that
the segment ends in. All of them are torch's own layers, named by type and arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

__all__ = ["SHORTCUT_KINDS", "Shortcut", "built", "describe", "in_mode_of", "why_no_layer"]

SHORTCUT_KINDS = ("separable", "pointwise", "dense")
_CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What each layer may be told, beside its sizes.
_ARGS: dict[str, set[str]] = {
    **{
        c.__name__: {
            *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
            *("dilation", "groups", "bias", "padding_mode"),
        }
        for c in _CONVS
    },
    **{n.__name__: {"num_features", "eps", "momentum"} for n in _NORMS},
    "ReLU": set(),
    "ReLU6": set(),
    "Hardtanh": {"min_val", "max_val"},
    "LeakyReLU": {"negative_slope"},
    "ELU": {"alpha"},
    "GELU": {"approximate"},
    "SiLU": set(),
    "Mish": set(),
    "Hardswish": set(),
    "Hardsigmoid": set(),
    "Sigmoid": set(),
    "Tanh": set(),
}
_MOST = 2**22  # of a size, and of a layer's weights 64 times that


@dataclass(frozen=True)
class Shortcut:
    """What is left of a segment. Sizes are one a dimension."""

    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    norm: bool = False
    activation: tuple[tuple[str, Any], ...] | None = None  # type and arguments, as pairs

    @property
    def macs_each(self) -> int:
        """Return the multiply-accumulates of one position of the output."""
        if self.kind == "separable":
            return self.in_channels * (prod(self.kernel) + self.out_channels)
        return self.in_channels * self.out_channels * prod(self.kernel)

    @property
    def num_params(self) -> int:
        """Return the parameters, with the bias that every such conv has once its norm is in it."""
        return self.macs_each + self.out_channels

    def layers(self) -> list[dict[str, Any]]:
        """Return the layers as plain data, in their order."""
        dims = len(self.kernel)
        conv = f"Conv{dims}d"
        sizes = {
            "kernel_size": list(self.kernel),
            "stride": list(self.stride),
            "padding": list(self.padding),
        }
        bias = not self.norm
        found: list[dict[str, Any]] = []
        if self.kind == "separable":
            depthwise = {
                "in_channels": self.in_channels,
                "out_channels": self.in_channels,
                "groups": self.in_channels,
                "bias": False,
            }
            found.append({"type": conv, "args": depthwise | sizes})
            sizes = {"kernel_size": [1] * dims}
        ends = {"in_channels": self.in_channels, "out_channels": self.out_channels, "bias": bias}
        found.append({"type": conv, "args": ends | sizes})
        if self.norm:
            found.append({"type": f"BatchNorm{dims}d", "args": {"num_features": self.out_channels}})
        if self.activation is not None:
            (_, name), *args = self.activation
            found.append({"type": name, "args": dict(args)})
        return found

    def __str__(self) -> str:
        size = "x".join(map(str, self.kernel))
        text = {
            "dense": f"a {size} conv",
            "pointwise": f"a {size} conv",
            "separable": f"a depthwise {size} and a 1x1 conv",
        }[self.kind]
        return text + (f", stride {max(self.stride)}" if max(self.stride) > 1 else "")


def why_no_layer(layer: Any) -> str | None:
    """Return why plain data describes none of the layers named here, or None."""
    if not isinstance(layer, dict) or set(layer) != {"type", "args"}:
        return "its fields"
    name, args = layer["type"], layer["args"]
    if not isinstance(name, str) or name not in _ARGS:
        return "'type'"
    if not isinstance(args, dict) or not set(args) <= _ARGS[name]:
        return "'args'"
    for value in args.values():
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > 3 or not all(_is_small(v) for v in numbers):
            return "'args'"
    if name.startswith("Conv"):
        sizes = (args.get(k, 1) for k in ("in_channels", "out_channels", "groups"))
        channels, out, groups = (s if isinstance(s, int) and s > 0 else 1 for s in sizes)
        kernel = args.get("kernel_size", [1])
        taps = prod(kernel) if isinstance(kernel, list) else _MOST
        if channels * out // groups * taps > 64 * _MOST:
            return "'args'"
    return None


def _is_small(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 16
    return isinstance(value, bool | int | float) and abs(value) <= _MOST


def built(layers: Sequence[dict[str, Any]], like: Tensor | None) -> nn.Sequential:
    """Return the described layers, in the type and on the device of ``like``.

    Raises:
        ValueError: there is no such layer, or its arguments do not fit it.
    """
    made: list[nn.Module] = []
    place = {} if like is None else {"device": like.device, "dtype": like.dtype}
    for layer in layers:
        fault = why_no_layer(layer)
        if fault:
            raise ValueError(f"not a layer ({fault}): {str(layer)[:160]}")
        cls = getattr(nn, layer["type"])
        args = {k: tuple(v) if isinstance(v, list) else v for k, v in layer["args"].items()}
        with_place = place if issubclass(cls, (*_CONVS, *_NORMS)) else {}
        try:
            made.append(cls(**args, **with_place))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"not a layer: {error}") from error
    return nn.Sequential(*made)


def in_mode_of(layers: nn.Module, segment: nn.Module) -> nn.Module:
    """Put the layers in the segment's mode, and their norm in that of its norms: frozen ones stay so."""
    norms = [m.training for m in segment.modules() if isinstance(m, _NORMS)]
    layers.train(segment.training)
    for layer in layers.modules():
        if isinstance(layer, _NORMS) and norms and not any(norms):
            layer.eval()
    return layers


def describe(module: nn.Module) -> list[dict[str, Any]]:
    """Return layers that :func:`built` made as plain data again."""
    found = []
    for layer in module.children():
        name = type(layer).__name__
        args = {
            k: list(v) if isinstance(v, tuple) else v
            for k in sorted(_ARGS[name])
            if k != "bias" and isinstance(v := getattr(layer, k), bool | int | float | str | tuple)
        }
        if isinstance(layer, _CONVS):
            args["bias"] = layer.bias is not None
        found.append({"type": name, "args": args})
    return found
