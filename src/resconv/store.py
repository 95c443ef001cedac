"""A network in a folder: ``model.safetensors`` for the numbers, ``model.json`` for everything else.

The JSON names the source of the architecture and the structural edits that made the net compact;
loading builds the one, replays the other, and copies the numbers in. Nothing is unpickled, and no
code comes from the folder: a source outside resconv, timm and torchvision is built only when the
caller says so, or hands in the model.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .edits import apply_edits
from .errors import LoadError, PlanError, PruneError, ResConvError
from .files import write_atomic, write_text
from .gates import Gate
from .plan import Plan
from .trace import unwrap
from .version import __version__

__all__ = ["FORMAT_VERSION", "load", "read_header", "save"]

FORMAT_VERSION = 1
_MAX_JSON = 64 * 2**20
_KEYS: dict[str, Any] = {
    "format_version": int,
    "resconv_version": str,
    "torch_version": str,
    "source": (dict, type(None)),
    "edits": list,
    "plan": (dict, type(None)),
    "inputs": list,
    "shared": dict,
    "dtype": str,
    "sha256": str,
    "num_bytes": int,
    "num_params": int,
}


def save(
    model: nn.Module, path: str | Path, *, plan: Plan | None = None, example_inputs: Any = None
) -> Path:
    """Write an ordinary (pruned, fused or dense) network into the folder ``path``.

    Both files are written beside and moved into place, the JSON last: a crash leaves the old net
    or none, never half of one. Returns the folder.

    Raises:
        LoadError: the model has gates left, so it is no ordinary network yet.
    """
    model = unwrap(model)
    gated = [n for n, m in model.named_modules() if isinstance(m, Gate)]
    if gated:
        raise LoadError(
            f"The model has {len(gated)} gates left ({', '.join(gated[:3])}...). Call "
            "resconv.prune or resconv.fuse first; a gated net in training is saved with "
            "torch.save(model.state_dict())."
        )
    folder = Path(path)
    if folder.is_file():
        raise LoadError(f"{folder} is a file; a network is saved into a folder.")
    tensors, shared = _tensors(model)
    weights = folder / "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(weights, lambda temporary: save_file(tensors, temporary))
    record = getattr(model, "resconv_record", None) or {}
    header = {
        "format_version": FORMAT_VERSION,
        "resconv_version": __version__,
        "torch_version": torch.__version__,
        "source": record.get("source") or getattr(model, "resconv_source", None),
        "edits": record.get("edits") or [],
        "plan": None if plan is None else json.loads(plan.to_json()),
        "inputs": [
            {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for t in tree_leaves(example_inputs)
            if isinstance(t, Tensor)
        ],
        "shared": shared,
        "dtype": str(
            next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        ).removeprefix("torch."),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "num_bytes": weights.stat().st_size,
        "num_params": sum(p.numel() for p in model.parameters()),
    }
    write_text(folder / "model.json", json.dumps(header, indent=2) + "\n")
    return folder


def load(
    path: str | Path,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    trust_source: bool = False,
) -> nn.Module:
    """Return the network saved in the folder ``path``, in eval mode.

    Args:
        path: what :func:`save` wrote.
        model: the net as it was before pruning, or a function that makes it. Needed where the
            file names no source; it is copied.
        trust_source: allow a source ``package.module:factory``, which imports and runs that
            package of this machine. Built-in, timm and torchvision nets need no permission.

    Raises:
        LoadError: the folder is missing, changed, truncated, from a newer format, or does not fit
            the model; all faults found are listed.
    """
    folder = Path(path)
    header = read_header(folder)
    weights = folder / "model.safetensors"
    _check_weights(weights, header)
    base = _base(header, folder, model, trust_source)
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{weights} is not a readable safetensors file: {error}.") from error
    _check_sizes(header, tensors)
    try:
        net = apply_edits(base, copy.deepcopy(header["edits"]))
    except PruneError as error:
        raise LoadError(f"{folder / 'model.json'} does not fit its source: {error}") from error
    dtype = getattr(torch, header["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise LoadError(f"{folder / 'model.json'}: dtype {header['dtype']!r} is no torch dtype.")
    if dtype.is_floating_point:
        net = net.to(dtype)
    for alias, first in header["shared"].items():
        if not isinstance(first, str) or first not in tensors:
            raise LoadError(f"{folder / 'model.json'}: shared tensor {alias!r} has no original.")
        tensors[alias] = tensors[first]
    _fill(net, tensors, folder)
    net.resconv_record = {"source": header["source"], "edits": header["edits"]}  # type: ignore[assignment]
    return net.eval()


def read_header(folder: Path) -> dict[str, Any]:
    """Return the checked content of ``model.json``.

    Raises:
        LoadError: it is missing or malformed; every fault is named.
    """
    file = folder / "model.json"
    if not folder.is_dir() or not file.is_file():
        what = "no such folder" if not folder.exists() else "it has no model.json"
        raise LoadError(f"{folder} holds no saved network: {what}.")
    if file.stat().st_size > _MAX_JSON:
        raise LoadError(f"{file} has {file.stat().st_size:,} bytes; that is no network's header.")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise LoadError(f"{file} is not JSON: {str(error)[:200]}.") from error
    if not isinstance(header, dict):
        raise LoadError(f"{file} is not a network's header: it holds a {type(header).__name__}.")
    version = header.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise LoadError(
            f"{file} has format version {version}; this resconv reads up to {FORMAT_VERSION}. "
            f"It was written by resconv {header.get('resconv_version')}: upgrade with "
            "pip install -U resconv."
        )
    faults = [f"{key!r} is missing" for key in _KEYS if key not in header]
    faults += [f"{key!r} is not known" for key in header if key not in _KEYS]
    faults += [
        f"{key!r} is a {type(header[key]).__name__}"
        for key, kind in _KEYS.items()
        if key in header and (not isinstance(header[key], kind) or isinstance(header[key], bool))
    ]
    if not faults and version != FORMAT_VERSION:
        faults.append(f"format version {version} is unknown")
    if faults:
        raise LoadError(f"{file} is damaged: {'; '.join(faults[:12])}.")
    if header["plan"] is not None:
        try:
            Plan.from_json(json.dumps(header["plan"]))
        except PlanError as error:
            raise LoadError(f"{file} is damaged: {error}") from error
    return header


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and the names under which a tensor stands again."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype)
        if value.numel() and key in seen:
            shared[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, shared


def _check_weights(weights: Path, header: dict[str, Any]) -> None:
    if not weights.is_file():
        raise LoadError(f"{weights} is missing.")
    size = weights.stat().st_size
    if size != header["num_bytes"]:
        raise LoadError(
            f"{weights} has {size:,} bytes, {header['num_bytes']:,} were written: it is truncated "
            "or was changed. Copy the folder again."
        )
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != header["sha256"]:
        raise LoadError(
            f"{weights} was changed after it was saved (SHA-256 {digest[:12]}..., "
            f"{header['sha256'][:12]}... is written in model.json). Copy the folder again."
        )
    try:
        with safe_open(weights, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{weights} is not a readable safetensors file: {error}.") from error


def _base(
    header: dict[str, Any],
    folder: Path,
    model: nn.Module | Callable[[], nn.Module] | None,
    trust_source: bool,
) -> nn.Module:
    if isinstance(model, nn.Module):
        return copy.deepcopy(unwrap(model))
    if model is not None:
        return model()
    source = header["source"]
    if source is None:
        raise LoadError(
            f"{folder} does not say which network it was made from (it was not built by "
            "resconv.nets.create). Give the unpruned net: resconv.load(path, model=your_net)."
        )
    name, kwargs = source.get("name"), source.get("kwargs")
    if (
        not isinstance(name, str)
        or not isinstance(kwargs, dict)
        or set(source) != {"name", "kwargs"}
    ):
        raise LoadError(f"{folder / 'model.json'}: 'source' is no name with keywords.")
    large = [k for k, v in kwargs.items() if isinstance(v, int | float) and abs(v) > 10**6]
    if large:
        raise LoadError(f"{folder / 'model.json'}: {large[0]}={kwargs[large[0]]} is unbelievable.")
    from .nets import create, runs_user_code

    if runs_user_code(name) and not trust_source:
        raise LoadError(
            f"{folder} was made from {name!r}, code that is in neither resconv, timm nor "
            "torchvision. If you trust it: resconv.load(path, trust_source=True), or give the "
            "net itself: resconv.load(path, model=your_net)."
        )
    try:
        return create(name, **kwargs)
    except ResConvError as error:
        raise LoadError(f"{folder}: its source cannot be built. {error}") from error


def _check_sizes(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse edits that would allocate more than the file itself holds."""
    held = sum(t.numel() for t in tensors.values())
    for edit in header["edits"]:
        if not isinstance(edit, dict) or edit.get("op") != "conv":
            continue
        args: Any = edit.get("args")
        numbers: list[Any] = [0]
        if isinstance(args, dict):
            kernel = args.get("kernel_size")
            numbers = [args.get("in_channels"), args.get("out_channels"), args.get("groups", 1)]
            numbers += kernel if isinstance(kernel, list) else [0]
        whole = all(isinstance(n, int) and n >= 1 for n in numbers)
        if not whole or math.prod(numbers) // numbers[2] ** 2 > held:
            raise LoadError(
                f"model.json asks for a convolution that the weights do not fill: {str(args)[:200]}"
            )


def _fill(net: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    own = {k: v for k, v in net.state_dict().items() if isinstance(v, Tensor)}
    faults = [f"{k} is missing" for k in own if k not in tensors]
    faults += [f"{k} belongs nowhere" for k in tensors if k not in own]
    faults += [
        f"{k} has shape {tuple(tensors[k].shape)}, not {tuple(v.shape)}"
        for k, v in own.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if faults:
        raise LoadError(
            f"{folder} does not fit its network: {len(faults)} faults ({'; '.join(faults[:6])}"
            f"{'; ...' if len(faults) > 6 else ''}). Was the source's version another one?"
        )
    net.load_state_dict(tensors, strict=False)
