"""The gates of a net in training form, as plain data: written by ``save``, put back by ``load``.

Paths are those of the net without gates, which the source and the edits give. The innermost gate
comes first: what is put around it later gives it another path.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import asdict
from torch import Tensor, nn

from ..errors import LoadError, SaveError
from ..nn.gates import BranchGate, FactorGate, Gate, ResConv, Segment
from ..nn.geometry import Reach
from ..nn.shortcuts import built, describe, in_mode_of, why_no_layer
from ..surgery.decisions import original_path
from ..surgery.state import set_submodule

__all__ = ["GateSpec", "describe_gates", "insert_gates"]

_NORMS: dict[str, type[nn.modules.batchnorm._BatchNorm]] = {
    k.__name__: k for k in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
}
_Steps = Annotated[tuple[Annotated[int, Meta(ge=0, lt=2**16)], ...], Meta(max_length=3)]


class _Part(Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a gate."""


class NormArgs(_Part, frozen=True):
    num_features: Annotated[int, Meta(gt=0, le=2**22)]
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool


class NormSpec(_Part, frozen=True):
    type: Literal["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"]
    args: NormArgs


class ReachSpec(_Part, frozen=True):
    tap: _Steps
    offset: _Steps


class GateSpec(_Part, frozen=True):
    """A gate: around a conv layer or a segment, or at the end of a branch ("block").

    A "factor" is the gate of a factor that stands outside of its product.

    Attributes:
        paths: all the names of what it stands around, in the net without gates.
        unit: its name for the user.
        reason: why the unit has to stay, if it has.
        norm, reach: what a conv layer's gate holds.
        left: the layers that may come in the place of a segment; none of a "gate".
        residual: how well they follow it, where that is known.
    """

    kind: Literal["layer", "block", "factor", "segment", "gate"]
    paths: Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(min_length=1)]
    unit: str
    reason: str | None
    norm: NormSpec | None
    reach: ReachSpec | None
    left: Annotated[tuple[dict[str, Any], ...], Meta(max_length=8)] = ()
    residual: float | None = None

    def __post_init__(self) -> None:
        if bool(self.left) != (self.kind == "segment"):
            raise ValueError("'left' is what segments have, and all of them")
        for layer in self.left:
            if fault := why_no_layer(layer):
                raise ValueError(f"not a layer ({fault}): {str(layer)[:120]}")


def describe_gates(model: nn.Module) -> tuple[GateSpec, ...]:
    """Return every gate of the model, the innermost first.

    Raises:
        SaveError: a gate holds a norm that no file can describe.
    """
    places: dict[int, list[str]] = {}
    found: list[Gate] = []
    for path, module in [*model.named_modules(remove_duplicate=False)][::-1]:
        if isinstance(module, Gate):
            if id(module) not in places:
                found.append(module)
            places.setdefault(id(module), []).append(original_path(model, path))
    return tuple(_describe(gate, places[id(gate)]) for gate in found)


def _describe(gate: Gate, paths: list[str]) -> GateSpec:
    norm = reach = None
    if isinstance(gate, ResConv):
        if gate.norm is not None:
            name = type(gate.norm).__name__
            if type(gate.norm) not in _NORMS.values():
                raise SaveError(
                    f"The norm of {gate.unit or paths[0]} is a {name}, which a "
                    f"saved net in training form cannot hold: it knows {', '.join(_NORMS)}."
                )
            args = NormArgs(*(getattr(gate.norm, n) for n in NormArgs.__struct_fields__))
            norm = NormSpec(name, args)  # type: ignore[arg-type]
        if gate.reach is not None:
            reach = ReachSpec(tuple(gate.reach.tap), tuple(gate.reach.offset))
    kind, residual = "layer" if isinstance(gate, ResConv) else "block", None
    left: tuple[dict[str, Any], ...] = ()
    if isinstance(gate, FactorGate):
        kind = "factor"
    if isinstance(gate, Segment):
        kind, residual = gate.kind, gate.residual
        left = () if kind == "gate" else tuple(describe(gate.left))
    names = tuple(dict.fromkeys(paths))
    return GateSpec(kind, names, gate.unit, gate.reason, norm, reach, left, residual)  # type: ignore[arg-type]


def insert_gates(net: nn.Module, gates: Iterable[GateSpec]) -> None:
    """Put gates around the layers of ``net``, in place; their numbers are filled in later.

    Raises:
        LoadError: the net has no such layer.
    """
    for spec in gates:
        path = spec.paths[0]
        try:
            module = net.get_submodule(path)
        except AttributeError:
            raise LoadError(
                f"The gates name {path[:120]!r}, which the net does not have."
            ) from None
        gate: Gate
        like = next((p for p in net.parameters() if p.is_floating_point()), None)
        if spec.kind in ("block", "factor"):
            gate = (BranchGate if spec.kind == "block" else FactorGate)(module, like=like)
        elif spec.kind in ("segment", "gate"):
            gate = _segment(module, spec, like)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            reach = None if spec.reach is None else Reach(spec.reach.tap, spec.reach.offset)
            gate = ResConv(module, None, reach=reach)
            if spec.norm is not None:
                gate.norm = _NORMS[spec.norm.type](**asdict(spec.norm.args))
        else:
            raise LoadError(f"{path[:120]!r} is a {type(module).__name__}, no convolution.")
        gate.unit, gate.reason = spec.unit, spec.reason
        for place in spec.paths:
            set_submodule(net, place, gate)


def _segment(module: nn.Module, spec: GateSpec, like: Tensor | None) -> Segment:
    own = next((p for p in module.parameters() if p.is_floating_point()), like)
    left: nn.Module = nn.Identity()
    if spec.left:
        try:
            left = built(spec.left, own)
        except ValueError as error:
            raise LoadError(f"The layers of {spec.paths[0][:120]!r}: {error}") from error
    gate = Segment(module, in_mode_of(left, module), like=like)
    gate.residual = spec.residual
    return gate
