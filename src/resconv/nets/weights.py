"""Load weights into a net, without running any code that the file may carry."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from resconv.errors import ModelError

__all__ = ["load_weights"]

_SHOWN = 5


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load ``path`` into ``model`` in place; every name and shape must match.

    ``.safetensors`` and ``.pt``/``.pth`` are read, the latter with ``weights_only=True``: a bare
    state dict, or one under ``"state_dict"`` or ``"model"``. A ``module.`` before every name, as
    DataParallel leaves it, is dropped. On an error ``model`` is as it was.

    Raises:
        ModelError: no such file, another format, a pickle that would run code, or names or
            shapes that differ from the model's.
    """
    path = Path(path)
    state = _read(path)
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    _check_match(model, state, path)
    # Old files lack BatchNorm's num_batches_tracked, which inference does not use.
    model.load_state_dict(state, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}. Check the path.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} ({path.stat().st_size:,} bytes) is not a readable safetensors file: "
                f"{error}. Download or save it again."
            ) from error
    if path.suffix in (".pt", ".pth"):
        return _find_state_dict(_unpickle_tensors(path), path)
    raise ModelError(
        f"{path} ends in {path.suffix or 'nothing'!r}: weights are read from .safetensors, .pt "
        "and .pth only. Save model.state_dict() in one of these."
    )


def _unpickle_tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().splitlines()[0]
        raise ModelError(
            f"{path} is refused: it holds more than tensors, and reading it would run code from "
            f"the file, which could do anything ({reason}). Where you trust its origin, save "
            "model.state_dict() as .safetensors there and load that."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size:,} bytes) is not a readable PyTorch file: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. "
            "Download or save it again."
        ) from error


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
        ):
            return dict(content)
        found = f"a dict with the keys {', '.join(map(repr, list(content)[:_SHOWN])) or '(none)'}"
    else:
        found = f"a {type(content).__name__}"
    raise ModelError(
        f"{path} holds {found}, not a state dict. Save model.state_dict(), bare or under the key "
        "'state_dict' or 'model'."
    )


def _check_match(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    missing = [key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")]
    unexpected = state.keys() - own.keys()
    mismatched = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    faults = [
        _describe("missing", [key for key in own if key in set(missing)]),
        _describe("unexpected", [key for key in state if key in unexpected]),
        _describe("of another shape", mismatched),
    ]
    if missing or unexpected or mismatched:
        raise ModelError(
            f"{path} does not fit {type(model).__name__} ({len(own)} tensors): "
            f"{'; '.join(filter(None, faults))}. Check the net's name, num_classes and in_channels."
        )


def _describe(kind: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {kind} ({', '.join(items[:_SHOWN])}{more})"
