"""The gates of a net in training form, as plain data: written by ``save``, put back by ``load``.

    {"kind": "layer" or "block", "paths": [...], "unit": name, "reason": text or null,
     "norm": {"type": "BatchNorm2d", "args": {...}} or null, "reach": {"tap": [..], "offset": [..]}}

A "factor" is the gate of a factor that stands outside of its product. A segment or a gate has
``"left"``, the layers that may come in its place (none of a gate), and ``"residual"``, a number or null.

Paths are those of the net without gates, which the source and the edits give. The innermost gate
comes first: what is put around it later gives it another path.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import LoadError, SaveError
from ..nn.gates import BranchGate, FactorGate, Gate, ResConv, Segment
from ..nn.geometry import Reach
from ..nn.shortcuts import built, describe, why_no_layer
from ..surgery.decisions import original_path
from ..surgery.state import set_submodule

__all__ = ["check_gates", "describe_gates", "insert_gates"]

_NORMS: dict[str, type[nn.modules.batchnorm._BatchNorm]] = {
    k.__name__: k for k in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
}
_NORM_ARGS = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_MAX_FEATURES = 2**22


def describe_gates(model: nn.Module) -> list[dict[str, Any]]:
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
    return [_describe(gate, places[id(gate)]) for gate in found]


def _describe(gate: Gate, paths: list[str]) -> dict[str, Any]:
    norm = reach = None
    if isinstance(gate, ResConv):
        if gate.norm is not None:
            if type(gate.norm) not in _NORMS.values():
                raise SaveError(
                    f"The norm of {gate.unit or paths[0]} is a {type(gate.norm).__name__}, which a "
                    f"saved net in training form cannot hold: it knows {', '.join(_NORMS)}."
                )
            args = {name: getattr(gate.norm, name) for name in _NORM_ARGS}
            norm = {"type": type(gate.norm).__name__, "args": args}
        if gate.reach is not None:
            reach = {"tap": list(gate.reach.tap), "offset": list(gate.reach.offset)}
    kind, more = "layer" if isinstance(gate, ResConv) else "block", {}
    if isinstance(gate, FactorGate):
        kind = "factor"
    if isinstance(gate, Segment):
        kind = gate.kind
        layers = [] if kind == "gate" else describe(gate.left)
        more = {"left": layers, "residual": gate.residual}
    return {
        "kind": kind,
        "paths": list(dict.fromkeys(paths)),
        "unit": gate.unit,
        "reason": gate.reason,
        "norm": norm,
        "reach": reach,
        **more,
    }


def check_gates(gates: list[Any]) -> str | None:
    """Return what is wrong with gates read from a file, or None."""
    for gate in gates:
        fault = _check(gate)
        if fault:
            return f"not a gate ({fault}): {str(gate)[:160]}"
    return None


def _check(gate: Any) -> str | None:
    keys = {"kind", "paths", "unit", "reason", "norm", "reach"}
    whole = isinstance(gate, dict) and gate.get("kind") in ("segment", "gate")
    if not isinstance(gate, dict) or set(gate) != keys | ({"left", "residual"} if whole else set()):
        return "its fields"
    paths, norm, reach = gate["paths"], gate["norm"], gate["reach"]
    if gate["kind"] not in ("layer", "block", "factor", "segment", "gate"):
        return "'kind'"
    if whole and (norm is not None or reach is not None or not _is_left(gate)):
        return "'left' or 'residual'"
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) and p for p in paths):
        return "'paths'"
    if not isinstance(gate["unit"], str) or not isinstance(gate["reason"], str | None):
        return "'unit' or 'reason'"
    if norm is not None and not (isinstance(norm, dict) and _is_norm(norm)):
        return "'norm'"
    if reach is not None:
        if not isinstance(reach, dict) or set(reach) != {"tap", "offset"}:
            return "'reach'"
        if not all(isinstance(v, list) and len(v) <= 3 for v in reach.values()):
            return "'reach'"
        numbers = [*reach["tap"], *reach["offset"]]
        if not all(type(n) is int and 0 <= n < 2**16 for n in numbers):
            return "'reach'"
    return None


def _is_left(gate: dict[str, Any]) -> bool:
    layers, residual = gate["left"], gate["residual"]
    if not isinstance(layers, list) or len(layers) > 8 or any(why_no_layer(e) for e in layers):
        return False
    if bool(layers) != (gate["kind"] == "segment"):
        return False
    number = isinstance(residual, float | int) and not isinstance(residual, bool)
    return residual is None or number


def _is_norm(norm: dict[str, Any]) -> bool:
    args = norm.get("args")
    if set(norm) != {"type", "args"} or not isinstance(args, dict) or set(args) != set(_NORM_ARGS):
        return False
    size, momentum = args["num_features"], args["momentum"]
    return (
        norm["type"] in _NORMS
        and type(size) is int
        and 0 < size <= _MAX_FEATURES
        and isinstance(args["eps"], float | int)
        and isinstance(momentum, float | int | None)
        and isinstance(args["affine"], bool)
        and isinstance(args["track_running_stats"], bool)
    )


def insert_gates(net: nn.Module, gates: list[dict[str, Any]]) -> None:
    """Put checked gates around the layers of ``net``, in place; their numbers are filled in later.

    Raises:
        LoadError: the net has no such layer.
    """
    for spec in gates:
        path = spec["paths"][0]
        try:
            module = net.get_submodule(path)
        except AttributeError:
            raise LoadError(
                f"The gates name {path[:120]!r}, which the net does not have."
            ) from None
        gate: Gate
        like = next((p for p in net.parameters() if p.is_floating_point()), None)
        if spec["kind"] == "block":
            gate = BranchGate(module, like=like)
        elif spec["kind"] == "factor":
            gate = FactorGate(module, like=like)
        elif spec["kind"] in ("segment", "gate"):
            gate = _segment(module, spec, like)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            gate = _layer(module, spec)
        else:
            raise LoadError(f"{path[:120]!r} is a {type(module).__name__}, no convolution.")
        gate.unit, gate.reason = spec["unit"], spec["reason"]
        for place in spec["paths"]:
            set_submodule(net, place, gate)


def _segment(module: nn.Module, spec: dict[str, Any], like: Tensor | None) -> Segment:
    own = next((p for p in module.parameters() if p.is_floating_point()), like)
    left: nn.Module = nn.Identity()
    if spec["left"]:
        try:
            left = built(spec["left"], own)
        except ValueError as error:
            raise LoadError(f"The layers of {spec['paths'][0][:120]!r}: {error}") from error
    gate = Segment(module, left.train(module.training), like=like)
    gate.residual = spec["residual"]
    return gate


def _layer(conv: nn.Module, spec: dict[str, Any]) -> ResConv:
    reach = spec["reach"]
    made = None if reach is None else Reach(tuple(reach["tap"]), tuple(reach["offset"]))
    gate = ResConv(conv, None, reach=made)
    if spec["norm"] is not None:
        gate.norm = _NORMS[spec["norm"]["type"]](**spec["norm"]["args"])
    return gate
