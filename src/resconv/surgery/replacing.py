"""What a surgery leaves in the place of segments: ordinary layers, with the norm in the conv before it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.algebra import fold_norm
from ..nn.gates import FactorGate, Segment
from ..nn.shortcuts import describe
from .decisions import Surgery, original_path
from .edit_kinds import Blend, Edit, Replace, Soften
from .edits import apply_edit

__all__ = ["Replaced", "put", "replacements"]


@dataclass(frozen=True)
class Replaced:
    """An edit, such as one that puts layers in a segment's place, and their numbers."""

    edit: Edit
    numbers: dict[str, Tensor]


def replacements(model: nn.Module, todo: Surgery, fuse: bool) -> list[Replaced]:
    """Return what comes in the place of segments, the innermost first.

    With ``fuse``, that is also the blend of a segment that is neither whole nor gone. Call it when
    all factors are in the weights.
    """
    found = []
    for path, segment in model.named_modules():
        if isinstance(segment, FactorGate) and fuse:
            if _softens(todo, path):
                at = original_path(model, path)
                found.append(Replaced(Soften(at, segment.scale.item()), {}))
            continue
        if not isinstance(segment, Segment):
            continue
        calls = todo.graph.calls_of(path)
        alive = calls and calls[0].end - 1 not in todo.dead
        gone = path in todo.replaced
        blends = fuse and calls and calls[0].end - 1 not in todo.bypassed
        if not alive or not (gone or blends):
            continue
        layers, numbers = _ordinary(segment.left, fuse)
        at = original_path(model, path)
        edit: Edit
        if not gone:
            edit = Blend(at, tuple(layers), segment.scale.item())
            numbers = {f"left.{k}": v for k, v in numbers.items()}
        else:
            edit = Replace(at, tuple(layers))
            if len(layers) == 1:  # no sequence of one
                numbers = {k.partition(".")[2]: v for k, v in numbers.items()}
        found.append(Replaced(edit, numbers))
    return found[::-1]


def _softens(todo: Surgery, path: str) -> bool:
    """Whether a factor stays that is neither itself nor 1."""
    calls = todo.graph.calls_of(path)
    node = calls[0].end - 1 if calls else -1
    return bool(calls) and node not in todo.dead and node not in todo.bypassed


def _ordinary(left: nn.Module, fuse: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return the layers as plain data with their numbers; with ``fuse``, without a norm."""
    if isinstance(left, nn.Identity):
        return [], {}
    layers = describe(left)
    every: list[Any] = list(left)  # type: ignore[call-overload]
    numbers: list[dict[str, Tensor]] = [
        {k: v.detach().clone() for k, v in m.state_dict().items()} for m in every
    ]
    at = next(
        (i for i, m in enumerate(every) if isinstance(m, nn.modules.batchnorm._BatchNorm)), None
    )
    if fuse and at is not None:
        conv, norm = every[at - 1], every[at].eval()
        weight, bias = fold_norm(conv.weight, conv.bias, norm)
        numbers[at - 1] = {"weight": weight, "bias": bias}
        layers[at - 1]["args"]["bias"] = True
        del layers[at], numbers[at]
    return layers, {f"{i}.{k}": v for i, held in enumerate(numbers) for k, v in held.items()}


def put(model: nn.Module, replaced: list[Replaced]) -> nn.Module:
    """Carry the edits out in place, with their numbers, and return the model."""
    for each in replaced:
        model = apply_edit(model, each.edit)
        if not each.numbers:
            continue
        state = model.get_submodule(each.edit.path).state_dict()
        with torch.no_grad():
            for name, value in each.numbers.items():
                state[name].copy_(value.to(state[name].dtype))
    return model
