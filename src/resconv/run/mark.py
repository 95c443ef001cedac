"""The mark of a run folder: what makes it one, which files are the run's, and what each stage used."""

import uuid
from pathlib import Path
from typing import Literal

import msgspec

from resconv.errors import RunError
from resconv.files import write_text
from resconv.json_files import read_json, to_json

__all__ = ["MARK", "Mark", "Record"]

MARK = "resconv-run.json"
_VERSION = 1


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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


class Mark(msgspec.Struct, forbid_unknown_fields=True):
    """The content of ``resconv-run.json``, which is written before any other file of the run.

    Attributes:
        id: of this run alone; its checkpoints carry it.
        files: what the run may have written, as paths in the folder. Nothing else is ever deleted.
        stages: the records of the finished stages, in the order in which they were finished.
    """

    id: str
    files: list[str]
    stages: dict[str, Record]
    format: Literal["resconv-run"] = "resconv-run"

    @classmethod
    def new(cls) -> "Mark":
        return cls(uuid.uuid4().hex, [], {})

    def write(self, folder: Path) -> None:
        write_text(folder / MARK, to_json(self, _VERSION))

    @classmethod
    def read(cls, folder: Path) -> "Mark":
        """Read the mark of ``folder``.

        Raises:
            RunError: it is damaged, or of a newer version.
        """
        path = folder / MARK
        try:
            mark = read_json(path, cls, RunError, upgrades=())
            for name in mark.files:
                if not _is_inside(name):
                    raise RunError(f"{path} is damaged: {name[:80]!r} is no place in the folder.")
        except RunError as error:
            next_step = "Nothing in the folder was touched: choose another --out."
            raise RunError(f"{error} {next_step}") from error
        return mark


def _is_inside(name: str) -> bool:
    """Whether a name leads to a place below the folder: others would let files outside go."""
    path = Path(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    )
