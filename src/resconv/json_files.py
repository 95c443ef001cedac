"""The one reader of JSON that resconv wrote and that anyone may have edited since.

A dataclass, a ``TypedDict`` or an annotation such as ``dict[str, float]`` says what a file holds.
Whatever else is there ends in one error, which names the file and the field: another type, a number
that is not finite, a key that is missing or unknown, text that cannot be written (a lone half of a
surrogate pair), nesting without end, a size beyond anything that was ever written.
"""

import json
import math
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import ResConvError

__all__ = ["MAX_BYTES", "parse_json", "read_bounded", "read_json"]

MAX_BYTES = 16 * 2**20
_MAX_NUMBER = 2**63
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    NoneType: "null",
}
T = TypeVar("T")


class _FieldError(Exception):
    """What is wrong, and in which field."""

    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where or 'the whole'} {text}")


def read_json(path: Path, kind: type[T], error: type[ResConvError]) -> T:
    """Return the content of a JSON file, checked to be a ``kind``.

    Raises:
        error: the file is missing, unreadable, too large, no JSON, or something else.
    """
    return parse_json(read_bounded(path, error), kind, str(path), error)


def read_bounded(path: Path, error: type[ResConvError]) -> bytes:
    """Return the bytes of an ordinary file of at most 16 MiB.

    Raises:
        error: there is none, it is a folder or a pipe, cannot be read, or is larger.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is no file.")  # reading a pipe would wait for ever
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as reason:  # ValueError: a null byte in the name
        what = getattr(reason, "strerror", None) or reason
        raise error(f"{path} cannot be read: {what}.") from reason
    if len(content) > MAX_BYTES:
        raise error(
            f"{path} is larger than {MAX_BYTES // 2**20} MiB, which no file of its kind is."
        )
    return content


def parse_json(text: str | bytes, kind: type[T], place: str, error: type[ResConvError]) -> T:
    """Return what the text holds, checked to be a ``kind``; ``place`` names it in errors.

    Lists become tuples where ``kind`` says so, objects become its dataclasses.

    Raises:
        error: no JSON, or something else than a ``kind``.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    try:
        content = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError as reason:
        raise error(f"{place} is damaged: it is nested too deeply.") from reason
    except ValueError as reason:
        raise error(f"{place} is not JSON: {str(reason)[:200]}.") from reason
    try:
        found: T = _checked(content, kind, "")
    except _FieldError as fault:
        raise error(f"{place} is damaged: {fault}.") from None
    except ResConvError as reason:  # a dataclass has its own rules
        raise error(f"{place}: {reason}") from reason
    return found


def _checked(value: Any, kind: Any, where: str) -> Any:
    """Return the value as a ``kind``; how deep this goes is up to the kind, not to the file."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any or kind is object:
        return value
    if origin in (Union, UnionType):
        return _one_of(value, args, where)
    if is_dataclass(kind) or is_typeddict(kind):
        return _record(value, kind, where)
    plain = origin or kind
    accepted = {float: (int, float), tuple: (list,)}.get(plain, (plain,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and plain is not bool):
        raise _FieldError(where, f"is {_shown(value)}, needed is {_WORDS[plain]}")
    if isinstance(value, int | float) and not abs(value) < (
        _MAX_NUMBER if isinstance(value, int) else math.inf
    ):
        raise _FieldError(where, f"is {_shown(value)}, which is out of range")
    if isinstance(value, str) and not value.isascii():
        _check_text(value, where)
    if plain is dict and args:
        for key in value:
            _check_text(key, where)
        return {k: _checked(v, args[1], _inside(where, k)) for k, v in value.items()}
    if plain is list and args:
        return [_checked(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if plain is tuple:
        return _tuple(value, args, where)
    return value


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    faults = []
    for kind in kinds:
        try:
            return _checked(value, kind, where)
        except _FieldError as fault:
            faults.append(fault)
    # The last that is no null or bare type tells most: what is inside it.
    words = [_WORDS[k] for k in kinds if k in _WORDS]
    if len(words) == len(kinds):
        raise _FieldError(where, f"is {_shown(value)}, needed is {' or '.join(words)}")
    raise faults[0]


def _record(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _FieldError(where, f"is {_shown(value)}, needed is an object")
    hints = get_type_hints(kind)
    if is_typeddict(kind):
        required, open_ended = set(kind.__required_keys__), True
    else:
        required = {
            f.name
            for f in fields(kind)
            if (f.default is MISSING and f.default_factory is MISSING) or f.metadata.get("required")
        }
        open_ended = False
    missing = [name for name in hints if name in required and name not in value]
    unknown = [name for name in value if name not in hints]
    if missing:
        raise _FieldError(where, f"has no {', '.join(map(repr, missing[:6]))}")
    if unknown and not open_ended:
        raise _FieldError(where, f"has unknown keys: {', '.join(map(repr, unknown[:6]))}")
    found = {
        name: _checked(inner, hints[name], _inside(where, name)) if name in hints else inner
        for name, inner in value.items()
    }
    return found if is_typeddict(kind) else kind(**found)


def _tuple(value: list[Any], args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if len(args) == 2 and args[1] is ...:
        return tuple(_checked(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if args and len(args) != len(value):
        raise _FieldError(where, f"has {len(value)} entries, needed are {len(args)}")
    pairs = zip(value, args or (Any,) * len(value), strict=True)
    return tuple(_checked(v, kind, f"{where}[{i}]") for i, (v, kind) in enumerate(pairs))


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _FieldError(where, f"holds {text[:60]!r}, which is no text") from None


def _inside(where: str, key: str) -> str:
    return f"{where}.{key[:60]}" if where else repr(key[:60])


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return _WORDS[type(value)]
    return _short(value)


def _short(value: Any) -> str:
    # Python refuses to write a whole number of thousands of digits.
    large = isinstance(value, int) and abs(value) >= 10**30
    return "a number of many digits" if large else repr(value)[:60]
