"""``model.safetensors``: the tensors of a net, each once, and the file read back."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

from ..errors import LoadError, SaveError
from .schema import Header

__all__ = ["compare_weights", "dtype_name", "is_channels_last", "read_weights", "tensors_of_model"]

_MAX_HEADER = 8 * 2**20  # of safetensors: some 50,000 tensors


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the tensor has the channels-last layout, and a plain one has not."""
    if tensor.is_contiguous():
        return False
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.ndim)
    return wanted is not None and tensor.is_contiguous(memory_format=wanted)


def tensors_of_model(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and the names under which a tensor stands again."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    memory: set[int] = set()
    unsaved = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if type(buffer) is Tensor and buffer.layout == torch.strided and not buffer.is_meta
    }
    for name, value in {**unsaved, **model.state_dict()}.items():
        if not isinstance(value, Tensor) or name.rpartition(".")[2] == "_extra_state":
            raise SaveError(
                f"{name} is extra state of {type(model).__name__} that is no parameter or buffer; "
                "it would be lost. Take it out of the model, or keep it elsewhere."
            )
        if type(value.detach()) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise SaveError(
                f"{name} is a {type(value).__name__} ({value.dtype}, {value.layout}), no plain "
                "tensor. Save the network before it is quantised or sharded."
            )
        key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype)
        if value.numel() and not value.is_meta and key in seen:
            shared[name] = seen[key]
            continue
        seen[key] = name
        try:
            plain = value.detach().cpu().contiguous()
            # The file's library refuses memory that two tensors share; only that is copied.
            storage = plain.untyped_storage()
            if storage.data_ptr() in memory or storage.nbytes() != plain.nbytes:
                plain = plain.clone()
            memory.add(storage.data_ptr())
            tensors[name] = plain
        except (RuntimeError, NotImplementedError) as error:
            raise SaveError(f"{name} has no values to save: {str(error)[:200]}") from error
    return tensors, shared


def compare_weights(weights: Path, tensors: dict[str, Tensor]) -> None:
    """Read the file back, one tensor at a time, and compare it with what was to be written."""
    with safe_open(weights, "pt") as file:
        for name, tensor in tensors.items():
            back = file.get_tensor(name)
            if (back.dtype, back.shape) != (tensor.dtype, tensor.shape) or not torch.equal(
                back.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)
            ):
                raise SaveError(
                    f"{name} was read back otherwise than it was written: the disk or its file "
                    "system is at fault. Save into another folder."
                )


def read_weights(weights: Path, header: Header) -> dict[str, Tensor]:
    """Read the file once, so that what is checked is what is used."""
    if not weights.is_file():
        raise LoadError(f"{weights} is missing.")
    size = weights.stat().st_size
    if size != header.num_bytes:
        raise LoadError(
            f"{weights} has {size:,} bytes, {header.num_bytes:,} were written: it is truncated "
            "or was changed. Copy the folder again."
        )
    try:
        content = weights.read_bytes()
    except (OSError, MemoryError) as error:
        raise LoadError(f"{weights} cannot be read: {error}.") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != header.sha256:
        raise LoadError(
            f"{weights} was changed after it was saved (SHA-256 {digest[:12]}..., "
            f"{header.sha256[:12]}... is written in model.json). Copy the folder again."
        )
    try:
        if int.from_bytes(content[:8], "little") > _MAX_HEADER:
            raise ValueError("its header is larger than any net's")
        return load_bytes(content)
    # The last two are what it makes of a type or a size that no tensor has.
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError, OverflowError) as error:
        raise LoadError(
            f"{weights} is not a readable safetensors file: {type(error).__name__}: "
            f"{str(error)[:200]}."
        ) from error
