"""The one reader of JSON that resconv wrote and that anyone may have edited since.

A ``msgspec.Struct`` (or a dataclass, or an annotation such as ``dict[str, float]``) says what a file
holds, and msgspec checks it. Whatever else is there ends in one error, which names the file and the
field: another type, a number that is not finite, a key that is missing, unknown or there twice, text
that cannot be written (a lone half of a surrogate pair), nesting without end, a size beyond anything
that was ever written.

Files have versions. A reader hands in its upgrades, the first of which makes version 2 of version 1;
there is one version more than upgrades, and a file of a newer one is refused.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .errors import ResConvError

__all__ = [
    "MAX_BYTES",
    "Upgrades",
    "checked",
    "load_json",
    "parse_json",
    "read_bounded",
    "read_json",
    "to_json",
    "to_plain",
    "upgraded",
    "version_in",
]

MAX_BYTES = 16 * 2**20
_MAX_DEPTH, _MAX_NUMBER = 24, 2**63
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number",
    "str": "text",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
Upgrades = Sequence[Callable[[Any], Any]]
T = TypeVar("T")


def read_json(
    path: Path, kind: type[T], error: type[ResConvError], upgrades: Upgrades | None = None
) -> T:
    """Return the content of a JSON file, checked to be a ``kind``.

    Raises:
        error: the file is missing, unreadable, too large, no JSON, of a newer version, or something
            else.
    """
    return parse_json(read_bounded(path, error), kind, str(path), error, upgrades)


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


def parse_json(
    text: str | bytes,
    kind: type[T],
    place: str,
    error: type[ResConvError],
    upgrades: Upgrades | None = None,
) -> T:
    """Return what the text holds, checked to be a ``kind``; ``place`` names it in errors.

    With ``upgrades`` the file has a version, and becomes one of the present version first.

    Raises:
        error: no JSON, of a newer version, or something else than a ``kind``.
    """
    content = load_json(text, place, error)
    if upgrades is not None:
        version = version_in(content, len(upgrades) + 1, place, error)
        content = upgraded(content, version, upgrades)
    return checked(content, kind, place, error)


def to_json(value: Any, version: int | None = None) -> str:
    """Return a struct as the text of a file, with its version."""
    plain = to_plain(value)
    return json.dumps(plain if version is None else {"version": version, **plain}, indent=2) + "\n"


def to_plain(value: Any) -> Any:
    """Return a struct, or what holds some, as plain data."""

    def plain(other: Any) -> Any:
        # Torch's version is a text of its own class, and numpy has numbers of its own.
        if isinstance(other, str):
            return str(other)
        if isinstance(other, Integral):
            return int(other)
        if isinstance(other, Real):
            return float(other)
        raise TypeError(f"a {type(other).__name__} is no plain data")

    return msgspec.to_builtins(value, enc_hook=plain)


def load_json(text: str | bytes, place: str, error: type[ResConvError]) -> Any:
    """Return the plain data in the text, in which every number and every text is sound.

    Raises:
        error: no JSON, or what no file of resconv holds.
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
    fault = _unsound(content)
    if fault:
        raise error(f"{place} is damaged: {fault}.")
    return content


def version_in(
    content: Any, newest: int, place: str, error: type[ResConvError], key: str = "version"
) -> int:
    """Return the version that the content says it has; 1 where it says none.

    Raises:
        error: it is no version, or one newer than this resconv knows.
    """
    version = content.get(key, 1) if isinstance(content, dict) else 1
    if type(version) is not int or version < 1:
        raise error(f"{place} is damaged: {key!r} is {_shown(version)}, needed is a whole number.")
    if version > newest:
        writer = f" It was written by resconv {content.get('resconv_version')!s:.40}."
        raise error(
            f"{place} has {key.replace('_', ' ')} {version}; this resconv reads up to {newest}."
            f"{writer if 'resconv_version' in content else ''} Upgrade with pip install -U resconv."
        )
    return version


def upgraded(content: Any, version: int, upgrades: Upgrades, key: str = "version") -> Any:
    """Return the content as the present version has it, without its number."""
    for upgrade in upgrades[version - 1 :]:
        content = upgrade(content)
    return {k: v for k, v in content.items() if k != key} if isinstance(content, dict) else content


def checked(content: Any, kind: type[T], place: str, error: type[ResConvError]) -> T:
    """Return plain data as a ``kind``.

    Raises:
        error: it is something else; the field is named.
    """
    try:
        found = msgspec.convert(content, kind)
    except msgspec.ValidationError as fault:
        raise error(f"{place} is damaged: {_in_words(str(fault), content, kind)}.") from None
    except ResConvError as reason:  # a dataclass has its own rules
        raise error(f"{place}: {reason}") from reason
    if is_dataclass(kind):  # of whose unknown keys msgspec says nothing
        unknown = [k for k in content if k not in {f.name for f in fields(kind)}]
        if unknown:
            named = ", ".join(repr(k[:60]) for k in unknown[:6])
            raise error(f"{place} is damaged: the whole has unknown keys: {named}.")
    return found


def _unsound(content: Any) -> str:
    """Return what is wrong with a number, a text or the depth, and where; empty if nothing is."""
    todo: list[tuple[Any, tuple[Any, ...], int]] = [([content], (), 0)]
    while todo:
        holder, way, depth = todo.pop()
        if depth > _MAX_DEPTH:
            return f"it is nested deeper than {_MAX_DEPTH} levels"
        for key, value in _entries(holder):
            fault = ""
            if isinstance(value, dict | list):
                todo.append((value, (way, key) if depth else (), depth + 1))
            elif isinstance(value, str):
                fault = "" if _is_text(value) else f"holds {value[:60]!r}, which is no text"
            elif isinstance(value, int | float) and not _in_range(value):
                fault = f"is {_shown(value)}, which is out of range"
            if isinstance(key, str) and not _is_text(key):
                fault = f"holds {key[:60]!r}, which is no text"
            if fault:
                steps = [] if depth == 0 else [key]
                while way:
                    way, step = way
                    steps.append(step)
                return f"{_named(steps[::-1])} {fault}"
    return ""


def _entries(holder: Any) -> Iterator[tuple[Any, Any]]:
    yield from holder.items() if isinstance(holder, dict) else enumerate(holder)


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _in_range(number: float) -> bool:
    return math.isfinite(number) if isinstance(number, float) else abs(number) < _MAX_NUMBER


def _in_words(fault: str, content: Any, kind: Any) -> str:
    """Return what msgspec says of a fault in the words of a reader of JSON, with the field."""
    text, at, path = fault.rpartition(" - at `")
    text, path = (text, path.removesuffix("`")) if at else (fault, "$")
    try:
        steps, value = _followed(path, content, kind, fault)
    except (KeyError, IndexError, TypeError):  # a key of the file's own that looks like a path
        return fault[:300]
    where = _named(steps)
    if match := re.fullmatch(r"Object missing required field `(.*)`", text):
        return f"{where} has no {match[1]!r}"
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        return f"{where} has unknown keys: {match[1][:60]!r}"
    if match := re.fullmatch(r"Expected (`.*`), got `.*`|Expected (`\w+` .*)", text):
        types = re.sub(r"`(.*?)`", lambda m: _types(m[1]), match[1] or match[2])
        found = f"has {len(value):,} entries" if "of length" in text else f"is {_shown(value)}"
        return f"{where} {found}, needed is {types}"
    if text.startswith(("Invalid value", "Invalid enum value")):
        return f"{where} is {_shown(value)}, which is not known"
    return f"{where}: {text[:300]}"


def _followed(path: str, content: Any, kind: Any, fault: str) -> tuple[list[Any], Any]:
    """Return the steps to the field of a fault, and what it holds; the content is used up."""
    steps: list[Any] = []
    value = content
    for name, index in _STEP.findall(path):
        step = name or (_guilty(value, content, kind, fault) if index == "..." else int(index))
        steps.append(step)
        value = value[step]
    return steps, value


def _guilty(holder: dict[str, Any], content: Any, kind: Any, fault: str) -> str:
    """Return the key of an object's value that is at fault; msgspec does not tell it."""
    every, keys = dict(holder), list(holder)
    while len(keys) > 1:
        half = keys[: len(keys) // 2]
        holder.clear()
        holder.update({k: every[k] for k in half})
        try:
            msgspec.convert(content, kind)
            found = ""
        except (msgspec.ValidationError, ResConvError) as error:
            found = str(error)
        keys = half if found == fault else keys[len(half) :]
    holder.clear()
    holder.update({k: every[k] for k in keys})
    return keys[0]


def _types(names: str) -> str:
    return " or ".join(_WORDS.get(n, n) for n in names.split(" | "))


def _named(steps: Sequence[Any]) -> str:
    """Return the way to a field as a reader writes it: ``'latency'.torch[0]``."""
    text = ""
    for step in steps:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step[:60]}" if text else repr(step[:60])
    return text or "the whole"


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return _WORDS["array" if isinstance(value, list) else "object"]
    # Python refuses to write a whole number of thousands of digits.
    large = isinstance(value, int) and abs(value) >= 10**30
    return "a number of many digits" if large else repr(value)[:60]
