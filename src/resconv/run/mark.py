"""The mark of a run folder: what makes it one, which files are the run's, and what each stage used."""

import json
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

from resconv.errors import RunError
from resconv.files import write_text
from resconv.json_files import parse_json, read_bounded

__all__ = ["MARK", "Mark", "Record"]

MARK = "resconv-run.json"
_FORMAT, _VERSION = "resconv-run", 1


@dataclass(frozen=True)
class Record:
    """What a finished stage read and wrote.

    Attributes:
        settings: those of the run that bear on training and planning.
        data: a fingerprint of the images and labels (see fingerprint.py).
        read, wrote: the SHA-256 of files; those outside the folder by their whole path.
        metrics: the keys that the stage left in ``metrics.json``.
    """

    settings: dict[str, bool | int | float | str | list[float] | None]
    data: dict[str, str]
    read: dict[str, str]
    wrote: dict[str, str]
    metrics: list[str]


@dataclass
class Mark:
    """The content of ``resconv-run.json``, which is written before any other file of the run.

    Attributes:
        id: of this run alone; its checkpoints carry it.
        files: what the run may have written, as paths in the folder. Nothing else is ever deleted.
        stages: the records of the finished stages, in the order in which they were finished.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    files: list[str] = field(default_factory=list)
    stages: dict[str, Record] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        write_text(folder / MARK, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Mark":
        """Read the mark of ``folder``.

        Raises:
            RunError: it is damaged, or of a newer version.
        """
        path = folder / MARK
        next_step = "Nothing in the folder was touched: choose another --out."
        try:
            text = read_bounded(path, RunError)
            kind = parse_json(text, _Kind, str(path), RunError)
            if kind["format"] != _FORMAT:
                raise RunError(f"{path} is damaged: its format is not {_FORMAT!r}.")
            if kind["version"] != _VERSION:
                raise RunError(
                    f"{path} is of version {kind['version']}, and this resconv reads {_VERSION}."
                )
            content = parse_json(text, _Content, str(path), RunError)
            for name in content["files"]:
                if not _is_inside(name):
                    raise RunError(f"{path} is damaged: {name[:80]!r} is no place in the folder.")
        except RunError as error:
            raise RunError(f"{error} {next_step}") from error
        return cls(content["id"], content["files"], content["stages"])


class _Kind(TypedDict):
    """What every version of the file has."""

    format: str
    version: int


class _Content(TypedDict):
    id: str
    files: list[str]
    stages: dict[str, Record]


def _is_inside(name: str) -> bool:
    """Whether a name leads to a place below the folder: others would let files outside go."""
    path = Path(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    )
