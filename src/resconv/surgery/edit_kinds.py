"""Structural edits of a module tree, as plain data: made by ``prune``, replayed by ``load``.

Replaying them runs nothing but ``edits.py`` and the constructors named there; whether an edit fits a
model is seen then. What a field may hold is said here, and checked when it is read from a file.
"""

import math
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from ..errors import PruneError
from ..nn.shortcuts import why_no_layer
from .arguments import decode

__all__ = [
    "Append",
    "Blend",
    "Bypass",
    "Children",
    "Clone",
    "Conv",
    "Copy",
    "Drop",
    "Edit",
    "Geometry",
    "Identity",
    "Merge",
    "Multiply",
    "Outplace",
    "PassedBy",
    "Replace",
    "Soften",
    "TrainingForward",
]

_Positive = Annotated[int, Meta(ge=1)]
_Whole = Annotated[int, Meta(ge=0)]
_Name = Annotated[str, Meta(min_length=1)]


class _Plain(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Plain data, whose unset fields are not written."""


class _At(_Plain, frozen=True, tag_field="op"):
    """An edit of the module at ``path`` (of the net without gates; empty for the whole model)."""

    path: str


class Geometry(_Plain, frozen=True):
    """What a convolution is made with; the rest is as torch has it."""

    in_channels: _Positive
    out_channels: _Positive
    kernel_size: Annotated[tuple[_Positive, ...], Meta(min_length=1, max_length=3)]
    stride: tuple[_Positive, ...] | UnsetType = UNSET
    padding: Literal["same", "valid"] | tuple[_Whole, ...] | UnsetType = UNSET
    dilation: tuple[_Positive, ...] | UnsetType = UNSET
    groups: _Positive | UnsetType = UNSET
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] | UnsetType = UNSET
    bias: bool | UnsetType = UNSET


class Conv(_At, frozen=True, tag="conv"):
    """Put an ordinary convolution of the given geometry there."""

    type: Literal["Conv1d", "Conv2d", "Conv3d"]
    args: Geometry


class Identity(_At, frozen=True, tag="identity"):
    """The module does nothing any more."""


class Drop(_At, frozen=True, tag="drop"):
    """The identity is taken out of its ``nn.Sequential``."""


class Clone(_At, frozen=True, tag="clone"):
    """The module only copies its input.

    An in-place operation behind it would otherwise write into a value that is still needed.
    """


class Copy(_At, frozen=True, tag="copy"):
    """The same where a gradient is recorded, and nothing elsewhere: the backward pass needs the value."""


class Outplace(_At, frozen=True, tag="outplace"):
    """The activation no longer writes in place, for the same reason."""


class Children(_At, frozen=True, tag="children"):
    """The module runs only the named children of itself, in that order."""

    names: tuple[str, ...]


class _Factor(_At, frozen=True):
    factor: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise ValueError(f"the factor {self.factor} is not finite")


class Multiply(_Factor, frozen=True, tag="multiply"):
    """A constant factor that could not be absorbed, in place of the module."""


class Append(_Factor, frozen=True, tag="append"):
    """The same, behind the module."""


class _Layers(_At, frozen=True):
    layers: Annotated[tuple[dict[str, Any], ...], Meta(max_length=8)]

    def __post_init__(self) -> None:
        for layer in self.layers:
            if fault := why_no_layer(layer):
                raise ValueError(f"not a layer ({fault}): {str(layer)[:120]}")


class Replace(_Layers, frozen=True, tag="replace"):
    """The named layers, in a row, in the place of the module: a segment's shortcut (nn/shortcuts.py)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise ValueError("there are no layers to put there")


class Blend(_Layers, frozen=True, tag="blend"):
    """The module and the named layers beside it (none: its input), weighed by a constant factor."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.factor):
            raise ValueError(f"the factor {self.factor} is not finite")


class Soften(_Factor, frozen=True, tag="soften"):
    """1 plus a constant times what the module returns less 1, in its place."""


class Merge(_At, frozen=True, tag="merge"):
    """The module merges its training-time branches, by its own method."""


class PassedBy(_Plain, frozen=True):
    """An operation of a traced forward that returns one of its arguments.

    Attributes:
        name: of the operation in the trace.
        argument: the position of what it returns.
        copy: whether that is copied, always or ("copy") only where it requires a gradient.
    """

    name: str
    argument: _Whole
    copy: Literal["clone", "copy"] | None = None


class TrainingForward(_Plain, frozen=True):
    """What :class:`Bypass` says of a forward, for the one in training mode."""

    nodes: tuple[PassedBy, ...]
    code: str
    branches: tuple[bool | _Whole, ...] = ()


class Bypass(_At, frozen=True, tag="bypass"):
    """In the forward of the module the operations ``nodes`` return one of their arguments.

    Attributes:
        constants: the arguments that the forward was traced with (see arguments.py).
        code: the digest of the trace.
        branches: how branches on sizes were taken.
        training: where the forward in training mode is another.
        removed: children and parameters that give way to identities and None. Without it the edit is
            of an earlier version (see earlier.py).
    """

    constants: dict[str, Any]
    nodes: tuple[PassedBy, ...]
    code: str
    branches: tuple[bool | _Whole, ...] = ()
    training: TrainingForward | None = None
    removed: tuple[_Name, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in self.constants.items():
            if not name.isidentifier():
                raise ValueError(f"{name[:60]!r} is no name of an argument")
            try:
                decode(value)
            except PruneError as error:
                raise ValueError(str(error)) from None


Edit = (
    Conv
    | Identity
    | Drop
    | Clone
    | Copy
    | Outplace
    | Children
    | Bypass
    | Multiply
    | Append
    | Replace
    | Blend
    | Soften
    | Merge
)
