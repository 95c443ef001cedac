"""Arguments of a forward as plain data: constants, and places that the next call fills."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import PruneError

__all__ = ["FREE", "decode", "encode", "filled", "leaves", "template"]

FREE = object()  # a place in an argument that the next call fills


def encode(value: Any, free: bool) -> Any:
    """Return an argument as plain data; with ``free`` its numbers are not fixed.

    Whatever is neither plain nor a container of plain values is handed on as it comes.
    """
    if isinstance(value, tuple | torch.Size) and not hasattr(value, "_fields"):
        return {"tuple": [encode(v, free) for v in value]}
    if type(value) is list:
        return [encode(v, free) for v in value]
    if type(value) is dict and all(isinstance(k, str) and k.isidentifier() for k in value):
        return {"dict": {k: encode(v, free) for k, v in value.items()}}
    if isinstance(value, bool | str | type(None)):
        return value
    if isinstance(value, int | float) and not free:
        return value
    return {"free": True}


def decode(value: Any) -> Any:
    """Return what :func:`encode` wrote, with ``FREE`` where a value is to be filled in.

    Raises:
        PruneError: it is nothing that was written so.
    """
    if isinstance(value, list):
        return [decode(v) for v in value]
    if isinstance(value, dict):
        if value == {"free": True}:
            return FREE
        if set(value) == {"tuple"} and isinstance(value["tuple"], list):
            return tuple(decode(v) for v in value["tuple"])
        if set(value) == {"dict"} and isinstance(value["dict"], dict):
            return {k: decode(v) for k, v in value["dict"].items()}
        raise PruneError(f"Not an argument: {str(value)[:100]}")
    return value


def template(signature: inspect.Signature, constants: dict[str, Any]) -> dict[str, Any]:
    """Return each parameter's argument: a tree of constants and ``FREE``.

    Raises:
        PruneError: a constant is malformed, or belongs to no parameter.
    """
    unknown = [name for name in constants if name not in signature.parameters]
    if unknown:
        raise PruneError(f"The forward takes no argument {unknown[0]!r}.")
    absent: dict[Any, Any] = {
        inspect.Parameter.VAR_POSITIONAL: (),
        inspect.Parameter.VAR_KEYWORD: {},
    }
    return {
        name: decode(constants[name]) if name in constants else absent.get(p.kind, FREE)
        for name, p in signature.parameters.items()
    }


def leaves(shape: Any, value: Any) -> Iterator[Any]:
    """Yield the parts of ``value`` that stand where ``shape`` is ``FREE``, in order."""
    if shape is FREE:
        yield value
    elif isinstance(shape, tuple | list):
        for s, v in zip(shape, value, strict=True):
            yield from leaves(s, v)
    elif isinstance(shape, dict):
        for key, s in shape.items():
            yield from leaves(s, value[key])


def filled(shape: Any, values: Iterator[Any]) -> Any:
    if shape is FREE:
        return next(values)
    if isinstance(shape, tuple | list):
        return type(shape)(filled(s, values) for s in shape)
    if isinstance(shape, dict):
        return {k: filled(s, values) for k, s in shape.items()}
    return shape
