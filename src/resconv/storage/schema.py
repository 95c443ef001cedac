"""``model.json``: what a saved network is made of, checked field by field when it is read.

Whoever wrote the file may be no friend, so nothing in it is used before it was looked at: its size
and depth, its numbers, its version, the checksum over the whole (a changed plan, edit or source is
noticed), and every field's type. The checksum tells damage, not malice: it can be made anew for any
content. What keeps a hostile file harmless is that only nets of resconv, timm and torchvision are
built from it (see sources.py), that the edits are plain data which ``edits.py`` carries out, and
that the memory which may be asked for is bounded (see building.py).
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from ..analysis.input_spec import InputSpec
from ..errors import LoadError
from ..json_files import checked, load_json, read_bounded, upgraded, version_in
from ..planning.plan import Plan
from ..preprocessing import Preprocessing
from ..surgery.edit_kinds import Edit
from ..surgery.provenance import Source
from .training_form import GateSpec

__all__ = ["FORMAT_VERSION", "Header", "read_header", "seal"]

_MAX_EDITS = 20_000
_Size = Annotated[int, Meta(ge=0)]
_Sha256 = Annotated[str, Meta(max_length=64)]


class Header(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of ``model.json``.

    Attributes:
        source, edits, plan, inputs, preprocessing, class_names: see
            :class:`resconv.surgery.provenance.Provenance`.
        modules: the type and the settings of every module, by path.
        shared: names under which a tensor stands again, and the one it is written under.
        frozen: parameters that need no gradient.
        channels_last: tensors that lie in memory so.
        unsaved: buffers that are not in the state dict, and their types.
        gates: of a net in training form; None for an ordinary net.
        sha256, num_bytes: of ``model.safetensors``.
    """

    resconv_version: str
    torch_version: str
    source: Source | None
    edits: Annotated[tuple[Edit, ...], Meta(max_length=_MAX_EDITS)]
    plan: Plan | None
    inputs: InputSpec | None
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    num_params: _Size
    modules: dict[str, str]
    shared: dict[str, str]
    frozen: tuple[str, ...]
    channels_last: tuple[str, ...]
    unsaved: dict[str, str]
    gates: Annotated[tuple[GateSpec, ...], Meta(max_length=_MAX_EDITS)] | None
    sha256: _Sha256
    num_bytes: _Size

    def __post_init__(self) -> None:
        if self.gates is not None and self.inputs is None:
            raise ValueError("a net in training form has no 'inputs'")


def _refuse_first(content: Any) -> Any:
    raise LoadError(
        "it has format version 1, which carries no checksum of its plan and edits. Save the network "
        "anew: `resconv prune RUN` writes a run's again."
    )


def _with_gates(content: dict[str, Any]) -> dict[str, Any]:
    """Version 2 had no gates, and no buffers that are not in the state dict."""
    return {"gates": None, **content}


def _with_names(content: dict[str, Any]) -> dict[str, Any]:
    """Version 3 had operations without names for their fields, and nothing of images and classes."""

    def named(form: Any) -> Any:
        if not isinstance(form, dict):
            return form
        form = {k: named(v) if k == "training" else v for k, v in form.items()}
        if isinstance(form.get("nodes"), list):
            keys = ("name", "argument", "copy")
            form["nodes"] = [
                dict(zip(keys, n, strict=False)) if isinstance(n, list) else n
                for n in form["nodes"]
            ]
        return form

    edits = content.get("edits")
    edits = [named(e) for e in edits] if isinstance(edits, list) else edits
    return {**content, "edits": edits, "preprocessing": None, "class_names": None}


_UPGRADES = (_refuse_first, _with_gates, _with_names)
FORMAT_VERSION = len(_UPGRADES) + 1


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with the SHA-256 of its canonical JSON in ``header_sha256``."""
    rest = {k: v for k, v in content.items() if k != "header_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**rest, "header_sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_header(folder: Path) -> Header:
    """Return the checked content of ``model.json``.

    Raises:
        LoadError: it is missing, malformed, changed or of a newer version; the field is named.
    """
    file = folder / "model.json"
    if not folder.is_dir() or not file.is_file():
        what = "no such folder" if not folder.exists() else "it has no model.json"
        if (folder / "config.json").is_file():
            what += f". It is a run that has not come to pruning yet: `resconv prune {folder}`"
        raise LoadError(f"{folder} holds no saved network: {what}.")
    content = load_json(read_bounded(file, LoadError), str(file), LoadError)
    if not isinstance(content, dict):
        raise LoadError(f"{file} is not a network's header: it holds a {type(content).__name__}.")
    version = version_in(content, FORMAT_VERSION, str(file), LoadError, "format_version")
    written, digest = content.get("header_sha256"), seal(content)["header_sha256"]
    if version > 1 and written != digest:
        raise LoadError(
            f"{file} was changed after it was saved (SHA-256 {digest[:12]}..., "
            f"{str(written)[:12]!r}... is written in it). Copy the folder again, or save the network "
            "anew."
        )
    content.pop("header_sha256", None)
    try:
        content = upgraded(content, version, _UPGRADES, "format_version")
    except LoadError as error:
        raise LoadError(f"{file}: {error}") from None
    return checked(content, Header, str(file), LoadError)
