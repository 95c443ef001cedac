"""Load weights into a net, without running any code that the file may carry.

All or nothing: the file is read and checked whole before the first number is copied. What a file
may cost is bounded by its own size: a header larger than any net's, or an archive that unpacks to
more than it is, is refused before it is read.
"""

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from resconv.errors import ModelError

__all__ = ["copy_weights", "load_weights", "read_weights"]

_SHOWN = 5
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")
# Under which keys trainers keep the state dict (an averaged one last: it is used where it is alone).
_KEYS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema")
# What wrappers put before every name: DataParallel, Lightning modules, torch.compile, own trainers.
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.")
_MAX_HEADER = 8 * 2**20  # of safetensors: some 50,000 tensors
_MAX_NESTING = 4
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_weights(model: nn.Module, path: str | Path, *, new_head: bool = False) -> tuple[str, ...]:
    """Load ``path`` into ``model`` in place; every name and shape must match.

    ``.safetensors`` and what ``torch.save`` wrote (``.pt``, ``.pth``, ``.ckpt``) are read, the
    latter with ``weights_only=True``: a bare state dict, or one inside a trainer's or Lightning's
    checkpoint. Prefixes that wrappers put before every name (``module.``, ``model.``,
    ``_orig_mod.``, ``net.``) are dropped. A floating type is converted to the model's own. On an
    error ``model`` is as it was.

    With ``new_head`` a head that tells other classes apart is left out, and the model keeps its own: tensors
    that differ in their first dimension alone, from one number of classes to another. The names of what was
    left out come back.

    Raises:
        ModelError: no such file, another format, a pickle that would run code, names or shapes that
            differ from the model's, numbers of another kind than the model's (whole, complex,
            quantised), or that are not finite.
    """
    return copy_weights(model, read_weights(path), path, new_head=new_head)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file, as it is.

    Raises:
        ModelError: as :func:`load_weights` does for a file that is none.
    """
    path = Path(path)
    try:
        return _read(path)
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged file sets off in a reader is its own fault
        raise _unreadable(path, error) from error


def copy_weights(
    model: nn.Module, state: Mapping[str, Tensor], place: object, *, new_head: bool = False
) -> tuple[str, ...]:
    """Copy a state dict into ``model``, as :func:`load_weights` does; ``place`` names it in errors.

    Raises:
        ModelError: as there.
    """
    try:
        found = _without_prefixes(dict(state), model)
        left_out = _other_head(model, found) if new_head else ()
        found = {k: v for k, v in found.items() if k not in left_out}
        _check_match(model, found, place, left_out)
        _check_values(model, found, place)
    except ModelError:
        raise
    except Exception as error:  # of tensors that are no plain ones
        raise ModelError(
            f"{place} holds no weights that can be used ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    _copy(model, found)
    return left_out


def _other_head(model: nn.Module, state: dict[str, Tensor]) -> tuple[str, ...]:
    """Return the tensors of the layer (or the layers) by which the classes are told apart, where these differ.

    More or fewer channels anywhere else would show in what reads them, too.
    """
    own = model.state_dict()
    differing = [k for k in own if k in state and own[k].shape != state[k].shape]
    rows = {(own[k].shape[:1], state[k].shape[:1]) for k in differing}
    is_head = len(rows) == 1 and all(
        own[k].ndim > 0 and own[k].shape[1:] == state[k].shape[1:] for k in differing
    )
    return tuple(differing) if is_head else ()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if not path.exists():
            raise ModelError(f"There is no weights file {path}. Check the path.")
        if not path.is_file():
            raise ModelError(f"{path} is no file. Give the file of the weights.")
        if path.suffix not in _SUFFIXES:
            raise ModelError(
                f"{path} ends in {path.suffix or 'nothing'!r}: weights are read from .safetensors, "
                ".pt, .pth and .ckpt only. Save model.state_dict() in one of these."
            )
        with path.open("rb") as file:
            start = file.read(8)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if path.suffix == ".safetensors":
        size = int.from_bytes(start, "little")
        if size > min(_MAX_HEADER, path.stat().st_size - 8):
            raise _unreadable(path, ValueError(f"a header of {size:,} bytes is no net's"))
        return load_file(path)
    return _find_state_dict(_unpickle_tensors(path), path)


def _unreadable(path: Path, error: Exception) -> ModelError:
    lines = str(error).splitlines() or [""]
    size = f" ({path.stat().st_size:,} bytes)" if os.path.isfile(path) else ""  # whatever the name
    return ModelError(
        f"{path}{size} is not a readable weights file ({type(error).__name__}: {lines[0][:200]}). "
        "Download or save it again."
    )


def _unpickle_tensors(path: Path) -> Any:
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().splitlines()[0]
        raise ModelError(
            f"{path} is refused: it holds more than tensors, and reading it would run code from "
            f"the file, which could do anything ({reason[:200]}). Where you trust its origin, save "
            "model.state_dict() as .safetensors there and load that."
        ) from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that is packed: torch never packs, and a small one may unpack to anything."""
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6 holds its numbers as they are
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
    if packed or sum(e.file_size for e in entries) > path.stat().st_size:
        raise ModelError(
            f"{path} is a packed archive ({len(packed)} of {len(entries)} entries), which "
            "torch.save does not write. Unpack it, or save model.state_dict() again."
        )


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    found: Any = content
    for _ in range(_MAX_NESTING):  # an EMA keeps a "state_dict" or "module" of its own
        if not isinstance(found, dict) or _is_state(found):
            break
        inner = next((found[k] for k in (*_KEYS, "module") if isinstance(found.get(k), dict)), None)
        if inner is None:
            break
        found = inner
    if _is_state(found):
        return dict(found)
    if isinstance(found, dict):
        what = f"a dict with the keys {', '.join(map(repr, list(found)[:_SHOWN])) or '(none)'}"
    else:
        what = f"a {type(found).__name__}"
    raise ModelError(
        f"{path} holds {what[:300]}, not a state dict. Save model.state_dict(), bare or under one of "
        f"the keys {', '.join(map(repr, _KEYS))}."
    )


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _without_prefixes(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the state with the model's own names, where wrappers put something before them."""
    own = model.state_dict().keys()
    return max(_unwrapped(state), key=lambda candidate: len(candidate.keys() & own))


def _unwrapped(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the state, and what is left of it as prefixes are dropped one by one.

    A checkpoint of a training module holds more than its net (a loss, metrics): then the names
    behind the prefix are the net's.
    """
    yield state
    for _ in range(_MAX_NESTING):
        prefix = next((p for p in _PREFIXES if any(k.startswith(p) for k in state)), None)
        if prefix is None:
            return
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        yield state


def _check_match(
    model: nn.Module, state: dict[str, Tensor], path: object, left_out: tuple[str, ...] = ()
) -> None:
    own = {k: v for k, v in model.state_dict().items() if k not in left_out}
    # Old files lack BatchNorm's num_batches_tracked, which inference does not use.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    mismatched = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    faults = [
        _describe("missing", missing),
        _describe("unexpected", unexpected),
        _describe("of another shape", mismatched),
    ]
    if missing or unexpected or mismatched:
        raise ModelError(
            f"{path} does not fit {type(model).__name__} ({len(own)} tensors): "
            f"{'; '.join(filter(None, faults))}. Check the net's name, num_classes and in_channels."
        )


def _check_values(model: nn.Module, state: dict[str, Tensor], path: object) -> None:
    """Refuse what no conversion makes right: another kind of number, or none at all."""
    own = model.state_dict()
    faults = [_describe_value(key, value, own[key]) for key, value in state.items()]
    found = [fault for fault in faults if fault]
    if found:
        raise ModelError(
            f"{path}: {len(found)} tensors cannot be used ({'; '.join(found[:_SHOWN])}"
            f"{'; ...' if len(found) > _SHOWN else ''}). Save the trained net's own "
            "model.state_dict(), in floating point."
        )


def _describe_value(key: str, value: Tensor, own: Tensor) -> str:
    name = str(value.dtype).removeprefix("torch.")
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
        return f"{key} is a {type(value).__name__} ({value.layout}), no plain tensor"
    if own.is_meta:
        return f"{key} of the model is on the meta device, which keeps no numbers"
    if value.is_quantized or value.is_meta or value.is_nested:
        return f"{key} is {'quantised' if value.is_quantized else 'without values'} ({name})"
    kinds = ((torch.bool,), (torch.complex64, torch.complex128), _FLOATS)
    whole = not any(own.dtype in kind for kind in kinds)
    expected = next((kind for kind in kinds if own.dtype in kind), None)
    fits = value.dtype in expected if expected else value.dtype in _WHOLE
    if not fits:
        wanted = str(own.dtype).removeprefix("torch.")
        return f"{key} is {name}, {'whole numbers' if whole else wanted} are needed"
    if (value.is_floating_point() or value.is_complex()) and not torch.isfinite(value).all():
        return f"{key} holds NaN or infinite numbers"
    if value.is_floating_point() and value.numel():
        most = value.abs().max().item()
        if most > torch.finfo(own.dtype).max:
            return f"{key} holds {most:.3g}, more than {own.dtype} can"
    return ""


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _copy(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy checked numbers in; the tensors of the model stay the same objects."""
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def _describe(kind: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {kind} ({', '.join(items[:_SHOWN])}{more})"
