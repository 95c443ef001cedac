"""The numbers of a file put into the net that was built for it; every misfit is named."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import LoadError
from .modules import describe_modules, differing_modules
from .schema import Header
from .weights import dtype_name

__all__ = ["check_structure", "fill"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_structure(net: nn.Module, header: Header, folder: Path) -> None:
    """Refuse a net that is not the one that was saved; the modules are named."""
    faults = differing_modules(header.modules, describe_modules(net))
    if faults:
        raise LoadError(
            f"{folder}: the net that is built is not the one that was saved: {'; '.join(faults[:4])}"
            f"{f'; and {len(faults) - 4} more' if len(faults) > 4 else ''}. Was it changed by hand "
            "after it was made, or does it come from another version of its library? It was saved "
            f"with torch {header.torch_version[:40]}."
        )


def fill(net: nn.Module, tensors: dict[str, Tensor], header: Header, folder: Path) -> None:
    """Copy the numbers in, each tensor in the type it was saved in; every misfit is named."""
    shared = header.shared
    faults = [
        f"shared tensor {alias!r} has no original"
        for alias, first in shared.items()
        if first not in tensors or alias in tensors
    ]
    tensors = {**tensors, **{a: tensors[f] for a, f in shared.items() if f in tensors}}
    own = dict(net.state_dict(keep_vars=True))
    own |= {n: b for n in header.unsaved if (b := _unsaved(net, n, tensors)) is not None}
    faults += [f"{k} is missing" for k in own if k not in tensors]
    faults += [f"{k} belongs nowhere" for k in tensors if k not in own]
    both = [k for k in own if k in tensors]
    faults += [
        f"{k} has shape {tuple(tensors[k].shape)}, not {tuple(own[k].shape)}"
        for k in both
        if tensors[k].shape != own[k].shape
    ]
    faults += [
        f"{k} is {dtype_name(tensors[k].dtype)}, not {dtype_name(own[k].dtype)}"
        for k in both
        if not _same_kind(tensors[k].dtype, own[k].dtype)
    ]
    # A tensor that the net holds once cannot take two values.
    places: dict[int, str] = {}
    for k in both:
        first = places.setdefault(id(own[k]), k)
        if shared.get(k, k) != shared.get(first, first):
            faults.append(f"{k} and {first} are one tensor in the net, two in the file")
    names = {**dict(net.named_parameters(remove_duplicate=False)), **own}
    faults += [f"{n!r} to freeze is not there" for n in header.frozen if n not in names]
    faults += [f"{n!r} is not there" for n in header.channels_last if n not in own]
    buffers = dict(net.named_buffers())
    unsaved = {n: b for n, b in buffers.items() if n not in own}
    for n, b in unsaved.items():
        dtype = getattr(torch, header.unsaved.get(n, dtype_name(b.dtype)), None)
        if not isinstance(dtype, torch.dtype) or not _same_kind(dtype, b.dtype):
            faults.append(f"buffer {n} is {dtype_name(b.dtype)}, not {header.unsaved[n][:40]!r}")
        elif not faults and n not in tensors:
            b.data = b.data.to(dtype)
    if faults:
        raise LoadError(
            f"{folder} does not fit its network: {len(faults)} faults ({'; '.join(faults[:6])}"
            f"{'; ...' if len(faults) > 6 else ''}). Was the source's version another one?"
        )
    frozen, laid_out = set(header.frozen), set(header.channels_last)
    with torch.no_grad():
        for k in both:
            target = own[k]
            if target.dtype != tensors[k].dtype:
                target.data = target.data.to(tensors[k].dtype)
            if k in laid_out and target.ndim in (4, 5):
                layout = torch.channels_last if target.ndim == 4 else torch.channels_last_3d
                target.data = target.data.to(memory_format=layout)
            target.copy_(tensors[k])
    for n, p in net.named_parameters():
        p.requires_grad_(n not in frozen)
    _tie(net, own, shared)


def _unsaved(net: nn.Module, name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """Return the buffer, not in the state dict, that takes a tensor of the file; made where needed."""
    path, _, last = name.rpartition(".")
    try:
        owner = net.get_submodule(path)
    except AttributeError:
        return None
    if name not in tensors or last not in owner._buffers:
        return None
    buffer, new = owner._buffers[last], tensors[name]
    # Made in a forward, as a cache, or one number at many places.
    if (
        buffer is None
        or buffer.shape != new.shape
        or any(s == 0 and n > 1 for s, n in zip(buffer.stride(), buffer.shape, strict=True))
    ):
        buffer = owner._buffers[last] = torch.empty_like(new)
    return buffer


def _same_kind(a: torch.dtype, b: torch.dtype) -> bool:
    return a == b or (a in _FLOATS and b in _FLOATS)


def _tie(net: nn.Module, own: dict[str, Tensor], shared: dict[str, str]) -> None:
    """Share again what was shared when it was saved."""
    for alias, first in shared.items():
        if own[alias] is own[first]:
            continue
        path, _, name = alias.rpartition(".")
        owner = net.get_submodule(path)
        original = own[first]
        if name in owner._parameters and isinstance(original, nn.Parameter):
            owner._parameters[name] = original
        elif name in owner._buffers:
            owner._buffers[name] = original
