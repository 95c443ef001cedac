"""Saved nets on the Hugging Face hub: ``hf://OWNER/NAME``, and ``hf://OWNER/NAME@REVISION``."""

import re
from pathlib import Path
from typing import Any

from ..errors import LoadError, MissingExtraError, SaveError
from .runtimes import first_line
from .schema import read_header

__all__ = ["SCHEME", "fetched", "push"]

SCHEME = "hf://"
_PLACE = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_NET = ["model.json", "model.safetensors"]
# No settings, logs, checkpoints or reports: these hold paths of a machine, or images of the user's.
_PUSHED = [*_NET, "README.md", "plan.json", "*.onnx", "*.onnx.data"]


def push(path: str | Path, place: str, *, private: bool = False) -> str:
    """Put a saved net, or the net of a run, on the hub with its model card, and return the address.

    Of the folder go ``model.json``, ``model.safetensors``, ``README.md``, ``plan.json`` and the ONNX files. The
    repository is made where there is none. Who pushes is known by ``hf auth login`` or ``HF_TOKEN``.

    Args:
        path: what :func:`resconv.save` wrote, or the folder of a finished run.
        place: ``OWNER/NAME`` on the hub, with ``hf://`` before it or not.
        private: makes a new repository private.

    Raises:
        LoadError: the folder holds no saved net, or ``place`` is no place on the hub.
        SaveError: the hub cannot be reached, or does not let this user in.
        MissingExtraError: huggingface_hub is not installed.
    """
    folder = Path(path)
    read_header(folder)
    name, revision = _parts(place)
    hub = _hub()
    try:
        api = hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=_PUSHED,
            revision=revision,
            commit_message="A net made shallower by resconv",
        )
    except Exception as error:  # of the network and the hub
        raise SaveError(
            f"{folder} could not be pushed to {name} ({first_line(error)}). Log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write."
        ) from error
    return f"{SCHEME}{name}" + (f"@{revision}" if revision else "")


def fetched(place: str) -> Path:
    """Return the folder of a net on the hub, fetched once and kept by huggingface_hub.

    Raises:
        LoadError: ``place`` is no place on the hub, or it cannot be fetched.
        MissingExtraError: huggingface_hub is not installed.
    """
    name, revision = _parts(place)
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_NET))
    except Exception as error:  # of the network and the hub
        raise LoadError(
            f"{place} could not be fetched ({first_line(error)}). Without a network: fetch its model.json and "
            "model.safetensors elsewhere, and load the folder that holds them."
        ) from error


def _parts(place: str) -> tuple[str, str | None]:
    plain = place.removeprefix(SCHEME)
    if not _PLACE.fullmatch(plain):
        raise LoadError(
            f"{place!r} is no place on the hub: give {SCHEME}OWNER/NAME, or {SCHEME}OWNER/NAME@REVISION."
        )
    name, _, revision = plain.partition("@")
    return name, revision or None


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hf", "The Hugging Face hub") from error
    return huggingface_hub
