"""``model.json``: what a saved network is made of, checked field by field when it is read.

Whoever wrote the file may be no friend, so nothing in it is used before it was looked at: its size
and depth, its numbers, every field's type, the checksum over the whole (a changed plan, edit or
source is noticed), and then the fields that lead to something being built. The checksum tells
damage, not malice: it can be made anew for any content. What keeps a hostile file harmless is that
only nets of resconv, timm and torchvision are built from it (see ``check_source``), that the edits
are plain data which ``edits.py`` carries out, and that the memory which may be asked for is bounded.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from torch import fx, nn

from ..analysis.input_spec import check_signature
from ..errors import LoadError, PlanError
from ..json_files import parse_json, read_bounded
from ..nn.shortcuts import why_no_layer
from ..planning.plan import Plan
from .training_form import check_gates

__all__ = [
    "FORMAT_VERSION",
    "check_source",
    "describe_modules",
    "differing_modules",
    "read_header",
    "seal",
]

# 1 had no checksum of its own and no settings of the modules; 2 had no gates, and no buffers that
# are not in the state dict.
FORMAT_VERSION = 3
_MAX_DEPTH, _MAX_EDITS, _MAX_NUMBER = 24, 20_000, 2**63
_KEYS: dict[str, Any] = {
    "format_version": int,
    "resconv_version": str,
    "torch_version": str,
    "source": (dict, type(None)),
    "edits": list,
    "plan": (dict, type(None)),
    "inputs": (dict, type(None)),
    "num_params": int,
    "modules": dict,
    "shared": dict,
    "frozen": list,
    "channels_last": list,
    "unsaved": dict,
    "gates": (list, type(None)),
    "sha256": str,
    "num_bytes": int,
    "header_sha256": str,
}
# What a layer is configured by. A list of our own: torch's repr of a layer changes now and then.
_SETTINGS = (
    *("in_channels", "out_channels", "in_features", "out_features", "num_features"),
    *("num_groups", "normalized_shape", "kernel_size", "stride", "padding", "output_padding"),
    *("dilation", "groups", "padding_mode", "eps", "affine", "negative_slope", "inplace"),
    *("ceil_mode", "count_include_pad", "output_size", "mode", "scale_factor", "align_corners"),
    *("approximate", "alpha", "min_val", "max_val", "p", "dim", "upscale_factor"),
    *("start_dim", "end_dim", "num_parameters"),
)
# Words of a keyword by which a factory fetches, reads or runs something ...
_FETCHING = re.compile(
    r"(^|_)(pretrained|weights?|checkpoint|ckpt|url|path|file|filename|dir|directory|cache|hub|download"
    r"|cfg|config|overlay|filter|fn)(_|$)"
)
# ... but for these, which are numbers and words for how a layer is made.
_HARMLESS = re.compile(
    r"(^|_)(drop_path(_rates?|_prob)?|weight_init|init_weights?|weight_standardization|filter_sizes?"
    r"|pretrained_window_sizes?|attention_bias_cache)$"
)
# How large a number may be, by what the keyword counts; the first that fits.
_MOST = (
    (re.compile(r"class"), 10**6),
    (re.compile(r"depth|repeat|block|layer|stage|mult|expan|ratio|scale|head"), 512),
    (re.compile(r"window|kernel|stride|dilat|patch|reduction|group"), 64),
    (re.compile(r""), 2**14),  # widths, and sides of images
)


def describe_modules(model: nn.Module) -> dict[str, str]:
    """Return ``{path: type and settings}`` of every module.

    A torch layer is written ``Conv2d(kernel_size=(3, 3), ...)``; a class of another library with
    its module's name, which says something to a reader but is not compared: libraries move classes.
    """
    return {path: _describe_module(m) for path, m in model.named_modules()}


def _describe_module(module: nn.Module) -> str:
    kind = type(module)
    name = kind.__name__
    if isinstance(module, nn.Identity):  # with what attributes it is, is no setting of the net
        return "Identity()"
    if isinstance(module, fx.GraphModule):
        name = "torch.fx.GraphModule"
    elif not kind.__module__.startswith("torch.nn."):
        name = f"{kind.__module__}.{name}"
    settings = []
    for key in _SETTINGS:
        value = module.__dict__.get(key)
        items = value if isinstance(value, tuple | list) else (value,)
        if value is not None and all(isinstance(i, bool | int | float | str) for i in items):
            settings.append(f"{key}={tuple(value) if isinstance(value, list) else value!r}")
    return f"{name}({', '.join(settings)})"


def differing_modules(saved: dict[str, str], built: dict[str, str]) -> list[str]:
    """Return, in words, where two descriptions of a net differ."""
    faults = [f"{p or 'the net'} is not there" for p in saved if p not in built]
    faults += [f"{p or 'the net'} was not saved" for p in built if p not in saved]
    for path, text in saved.items():
        if path in built and _compared(text) != _compared(built[path]):
            faults.append(f"{path or 'the net'} is {built[path]}, saved was {text[:200]}")
    return faults


def _compared(text: str) -> str:
    name, bracket, settings = text.partition("(")
    return bracket + settings if "." in name else text


def seal(header: dict[str, Any]) -> dict[str, Any]:
    """Return the header with the SHA-256 of its canonical JSON in ``header_sha256``."""
    rest = {k: v for k, v in header.items() if k != "header_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**rest, "header_sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_header(folder: Path) -> dict[str, Any]:
    """Return the checked content of ``model.json``.

    Raises:
        LoadError: it is missing, malformed or changed; every fault is named.
    """
    file = folder / "model.json"
    header = _parse(folder, file)
    version = header.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise LoadError(
            f"{file} has format version {version}; this resconv reads up to {FORMAT_VERSION}. "
            f"It was written by resconv {str(header.get('resconv_version'))[:40]}: upgrade with "
            "pip install -U resconv."
        )
    if version == 1:
        raise LoadError(
            f"{file} has format version 1, which carries no checksum of its plan and edits. Save the "
            "network anew: `resconv prune RUN` writes a run's again."
        )
    since = {"gates": 3}
    needed = [k for k in _KEYS if since.get(k, 0) <= (version if isinstance(version, int) else 0)]
    faults = [f"{key!r} is missing" for key in needed if key not in header]
    faults += [f"{key[:80]!r} is not known" for key in header if key not in needed]
    faults += [
        f"{key!r} is a {type(header[key]).__name__}"
        for key, kind in _KEYS.items()
        if key in needed
        and key in header
        and (not isinstance(header[key], kind) or isinstance(header[key], bool))
    ]
    if not faults and version not in (2, FORMAT_VERSION):
        faults.append(f"format version {version} is unknown")
    if faults:
        raise LoadError(f"{file} is damaged: {'; '.join(faults[:12])}.")
    digest = seal(header)["header_sha256"]
    if digest != header["header_sha256"]:
        raise LoadError(
            f"{file} was changed after it was saved (SHA-256 {digest[:12]}..., "
            f"{header['header_sha256'][:12]!r}... is written in it). Copy the folder again, or save "
            "the network anew."
        )
    header.setdefault("gates", None)
    faults = _faults(header)
    if faults:
        raise LoadError(f"{file} is damaged: {'; '.join(faults[:12])}.")
    return header


def _parse(folder: Path, file: Path) -> dict[str, Any]:
    if not folder.is_dir() or not file.is_file():
        what = "no such folder" if not folder.exists() else "it has no model.json"
        if (folder / "config.json").is_file():
            what += f". It is a run that has not come to pruning yet: `resconv prune {folder}`"
        raise LoadError(f"{folder} holds no saved network: {what}.")
    content = read_bounded(file, LoadError)
    header: Any = parse_json(content, object, str(file), LoadError)
    if not isinstance(header, dict):
        raise LoadError(f"{file} is not a network's header: it holds a {type(header).__name__}.")
    todo: list[tuple[Any, int]] = [(header, 1)]
    while todo:
        value, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise LoadError(f"{file} is damaged: it is nested deeper than {_MAX_DEPTH} levels.")
        if isinstance(value, str) and not value.isascii() and _has_surrogate(value):
            raise LoadError(f"{file} is damaged: {value[:60]!r} is no text.")
        if isinstance(value, float | int) and not abs(value) < _MAX_NUMBER:
            raise LoadError(f"{file} is damaged: the number {str(value)[:24]} is out of range.")
        if isinstance(value, dict | list):
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            todo += [(v, depth + 1) for v in inner]
    return header


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _faults(header: dict[str, Any]) -> list[str]:
    faults = []
    if header["plan"] is not None:
        try:
            Plan.from_json(json.dumps(header["plan"]))
        except PlanError as error:
            faults.append(str(error))
    if header["inputs"] is not None:
        fault = check_signature(header["inputs"])
        faults += [f"'inputs': {fault}"] if fault else []
    if header["num_bytes"] < 0 or header["num_params"] < 0:
        faults.append("a size is negative")
    for key in ("modules", "shared", "unsaved"):
        if not all(isinstance(v, str) for v in header[key].values()):
            faults.append(f"{key!r} has values that are no text")
    for key in ("frozen", "channels_last"):
        if not all(isinstance(v, str) for v in header[key]):
            faults.append(f"{key!r} has entries that are no names")
    if len(header["edits"]) > _MAX_EDITS:
        faults.append(f"{len(header['edits']):,} edits are more than any net needs")
    for edit in header["edits"][:_MAX_EDITS]:
        fault = _check_edit(edit)
        if fault:
            faults.append(f"not an edit ({fault}): {str(edit)[:160]}")
            break
    if header["gates"] is not None:
        if len(header["gates"]) > _MAX_EDITS:
            faults.append(f"{len(header['gates']):,} gates are more than any net needs")
        fault = check_gates(header["gates"][:_MAX_EDITS])
        faults += [fault] if fault else []
        faults += [] if header["inputs"] is not None else ["a net in training form has no 'inputs'"]
    source = header["source"]
    if source is not None and (
        set(source) != {"name", "kwargs"}
        or not isinstance(source["name"], str)
        or not isinstance(source["kwargs"], dict)
    ):
        faults.append("'source' is no name with keywords")
    return faults


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, str) for n in value)


def _count(n: Any, least: int = 1) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= least


def _argument(value: Any) -> bool:
    """Whether this is an argument as ``edits.encode`` writes them; the depth was checked before."""
    if isinstance(value, list):
        return all(_argument(v) for v in value)
    if isinstance(value, dict):
        if set(value) == {"tuple"} and isinstance(value["tuple"], list):
            return _argument(value["tuple"])
        if set(value) == {"dict"} and isinstance(value["dict"], dict):
            return all(k.isidentifier() and _argument(v) for k, v in value["dict"].items())
        return value == {"free": True}
    return isinstance(value, bool | int | float | str | type(None))


def _passed_by(value: Any) -> bool:
    """Whether these are names of operations, the position of what each passes on, and how."""
    return isinstance(value, list) and all(
        isinstance(n, list)
        and len(n) in (2, 3)
        and isinstance(n[0], str)
        and _count(n[1], 0)
        and n[2:] in ([], ["clone"], ["copy"])
        for n in value
    )


def _decisions(value: Any) -> bool:
    """Whether these are branches that were taken, and numbers of items."""
    return isinstance(value, list) and all(isinstance(n, bool) or _count(n, 0) for n in value)


def _check_edit(edit: Any) -> str | None:
    """Return what is wrong with an edit's fields; whether it fits a model, ``edits.py`` says."""
    if not isinstance(edit, dict):
        return "it is no object"
    for key, value in edit.items():
        good = True
        if key in ("op", "path", "code", "type"):
            good = isinstance(value, str)
        elif key in ("names", "removed"):
            good = _names(value)
        elif key == "factor":
            good = isinstance(value, int | float) and math.isfinite(value)
        elif key == "constants":
            # They become arguments of a forward that torch.fx traces.
            good = isinstance(value, dict) and all(
                k.isidentifier() and _argument(v) for k, v in value.items()
            )
        elif key == "nodes":
            good = _passed_by(value)
        elif key == "branches":
            good = _decisions(value)
        elif key == "training":
            good = (
                isinstance(value, dict)
                and set(value) - {"branches"} == {"nodes", "code"}
                and isinstance(value["code"], str)
                and _passed_by(value["nodes"])
                and _decisions(value.get("branches", []))
            )
        elif key == "layers":
            good = isinstance(value, list) and len(value) <= 8
            good = good and not any(why_no_layer(layer) for layer in value)
        elif key == "args":
            return _check_conv(value)
        if not good:
            return f"{key!r}"
    return None


def _check_conv(args: Any) -> str | None:
    if not isinstance(args, dict):
        return "'args'"
    for key, value in args.items():
        if key in ("in_channels", "out_channels", "groups"):
            good = _count(value)
        elif key in ("kernel_size", "stride", "dilation"):
            good = isinstance(value, list) and bool(value) and all(_count(n) for n in value)
        elif key == "padding":
            good = value in ("same", "valid") or (
                isinstance(value, list) and all(_count(n, 0) for n in value)
            )
        elif key == "padding_mode":
            good = value in ("zeros", "reflect", "replicate", "circular")
        else:
            good = key == "bias" and isinstance(value, bool)
        if not good:
            return f"{key!r}"
    return None


def check_source(source: dict[str, Any]) -> str | None:
    """Return why a zoo's net must not be built with these keywords, or None.

    A factory of timm or torchvision is other people's code with hundreds of keywords; those that
    fetch weights, read files or name code are refused by their looks. Such a net can still be
    loaded: give it as ``model=``.
    """
    todo = list(source["kwargs"].items())
    while todo:
        key, value = todo.pop()
        word = key.lower()
        if _FETCHING.search(word) and not _HARMLESS.search(word):
            return f"the keyword {key[:60]!r} can make its factory fetch or read something"
        if isinstance(value, list):
            todo += [(key, v) for v in value]  # depths and widths
        elif isinstance(value, str):
            if len(value) > 100 or any(c in value for c in "/\\:"):
                return f"{key}={value[:60]!r} is no setting of a net"
        elif isinstance(value, int | float):
            if abs(value) > next(most for pattern, most in _MOST if pattern.search(word)):
                return f"{key}={value} is unbelievable"
        elif value is not None:
            return f"{key}= holds an object"
    return None
