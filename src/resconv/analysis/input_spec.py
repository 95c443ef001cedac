"""What a network is fed, as plain data: structure, shapes and types of its inputs.

tensor   {"shape": [1, 3, 32, 32], "dtype": "float32"}
         whole numbers carry the range seen as well: "low", "high" (a class index, a token)
several  {"tuple": [...]}, {"list": [...]} or {"dict": {name: ...}}
constant {"value": true}
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError, SaveError

__all__ = ["check_signature", "describe_inputs", "make_inputs"]

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.complex64, torch.complex128, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_MAX_DEPTH, _MAX_ENTRIES, _MAX_ELEMENTS = 8, 1000, 2**28
_MAX_BYTES = 2**28  # of all inputs together, as they are made: 64 images of 3x512x512 are 201 MB


def describe_inputs(example_inputs: Any) -> dict[str, Any] | None:
    """Return the signature of a tensor, tuple, list or dict of inputs; None for None.

    Raises:
        SaveError: they hold something that plain data cannot describe.
    """
    if example_inputs is None:
        return None
    return _describe(example_inputs)


def _describe(x: Any) -> dict[str, Any]:
    if isinstance(x, Tensor):
        dtype = str(x.dtype).removeprefix("torch.")
        dense = x.layout == torch.strided and not (x.is_meta or x.is_nested)
        if dtype in _DTYPES and dense:
            spec: dict[str, Any] = {"shape": list(x.shape), "dtype": dtype}
            if not (x.dtype.is_floating_point or x.dtype.is_complex or dtype == "bool"):
                spec["low"] = int(x.min()) if x.numel() else 0
                spec["high"] = int(x.max()) if x.numel() else 0
            return spec
    elif isinstance(x, tuple | list):
        return {"tuple" if isinstance(x, tuple) else "list": [_describe(e) for e in x]}
    elif isinstance(x, Mapping) and all(isinstance(k, str) for k in x):
        return {"dict": {k: _describe(v) for k, v in x.items()}}
    elif isinstance(x, bool | int | float | str | type(None)):
        return {"value": x}
    what = f"{x.dtype} tensor ({x.layout})" if isinstance(x, Tensor) else type(x).__name__
    raise SaveError(
        f"example_inputs hold a {what}, which a saved signature cannot describe: it knows tensors, "
        "tuples, lists, dicts with names, numbers and strings."
    )


def check_signature(spec: Any) -> str | None:
    """Return what is wrong with a signature read from a file, or None."""
    todo, seen = [(spec, 1)], 0
    while todo:
        s, depth = todo.pop()
        seen += 1
        if depth > _MAX_DEPTH or seen > _MAX_ENTRIES:
            return "it is nested too deeply or too long"
        if not isinstance(s, dict):
            return f"{str(s)[:80]} is no input"
        keys = set(s)
        if keys in ({"tuple"}, {"list"}):
            inner = next(iter(s.values()))
            if not isinstance(inner, list):
                return f"{str(s)[:80]} is no list of inputs"
            todo += [(e, depth + 1) for e in inner]
        elif keys == {"dict"}:
            if not isinstance(s["dict"], dict):
                return f"{str(s)[:80]} is no dict of inputs"
            todo += [(e, depth + 1) for e in s["dict"].values()]
        elif keys == {"value"}:
            if not isinstance(s["value"], bool | int | float | str | type(None)):
                return f"{str(s)[:80]} is no constant"
        else:
            fault = _check_tensor(s, keys)
            if fault:
                return fault
    return None


def _check_tensor(s: dict[str, Any], keys: set[str]) -> str | None:
    shape, dtype = s.get("shape"), s.get("dtype")
    if keys not in ({"shape", "dtype"}, {"shape", "dtype", "low", "high"}):
        return f"{str(s)[:80]} is no tensor's description"
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"dtype {str(dtype)[:40]!r} is not known"
    if not isinstance(shape, list) or len(shape) > 16 or not all(_whole(n) for n in shape):
        return f"{str(shape)[:80]} is no shape"
    if math.prod(shape) > _MAX_ELEMENTS:
        return f"a tensor of shape {tuple(shape)} is too large for an example"
    if "low" in keys:
        low, high = s["low"], s["high"]
        if not all(isinstance(n, int) and abs(n) < 2**62 for n in (low, high)) or low > high:
            return f"the range {str(low)[:40]} to {str(high)[:40]} is none"
    return None


def _count_bytes(s: dict[str, Any]) -> int:
    """Return the bytes that making the inputs takes: whole numbers are drawn as int64."""
    if "shape" not in s:
        inner = next(iter(s.values()))
        inside = inner.values() if isinstance(inner, dict) else inner
        return 0 if "value" in s else sum(_count_bytes(e) for e in inside)
    dtype = _DTYPES[s["dtype"]]
    drawn = 0 if dtype.itemsize >= 4 and (dtype.is_floating_point or dtype.is_complex) else 8
    return int(math.prod(s["shape"])) * (dtype.itemsize + drawn)


def _whole(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0


def make_inputs(spec: dict[str, Any], generator: torch.Generator) -> Any:
    """Return random inputs of a checked signature: normal floats, whole numbers in their range.

    Raises:
        LoadError: they would take more than 256 MiB.
    """
    num_bytes = _count_bytes(spec)
    if num_bytes > _MAX_BYTES:
        raise LoadError(
            f"The inputs that are written down take {num_bytes:,} bytes, more than the "
            f"{_MAX_BYTES:,} that are made up to try a network. Give smaller ones, such as --shape "
            "1,3,224,224."
        )
    return _make(spec, generator)


def _make(spec: dict[str, Any], generator: torch.Generator) -> Any:
    if "tuple" in spec:
        return tuple(_make(s, generator) for s in spec["tuple"])
    if "list" in spec:
        return [_make(s, generator) for s in spec["list"]]
    if "dict" in spec:
        return {k: _make(s, generator) for k, s in spec["dict"].items()}
    if "value" in spec:
        return spec["value"]
    dtype = _DTYPES[spec["dtype"]]
    if dtype.is_complex or dtype in (torch.float64, torch.float32):
        return torch.randn(spec["shape"], dtype=dtype, generator=generator)
    if dtype.is_floating_point:
        return torch.randn(spec["shape"], generator=generator).to(dtype)
    low, high = spec.get("low", 0), spec.get("high", 1)
    return torch.randint(low, high + 1, spec["shape"], generator=generator).to(dtype)
