"""The mark of a run folder: what makes it one, which files are the run's, and what each stage used."""

import json
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resconv.errors import RunError
from resconv.files import write_text

__all__ = ["MARK", "Mark", "Record"]

MARK = "resconv-run.json"
_FORMAT, _VERSION = "resconv-run", 1
_MAX_BYTES = 8 << 20


@dataclass(frozen=True)
class Record:
    """What a finished stage read and wrote.

    Attributes:
        settings: those of the run that bear on training and planning.
        data: a fingerprint of the images and labels (see fingerprint.py).
        read, wrote: the SHA-256 of files; those outside the folder by their whole path.
        metrics: the keys that the stage left in ``metrics.json``.
    """

    settings: dict[str, Any]
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
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            if content.get("version") != _VERSION:
                version = str(content.get("version"))[:20]
                raise ValueError(f"it is of version {version}, and this resconv reads {_VERSION}")
            return cls(
                _text(content["id"]),
                [_inside(name) for name in content["files"]],
                {_text(name): _record(found) for name, found in content["stages"].items()},
            )
        except KeyError as error:
            raise RunError(f"{path} is damaged: it has no {error}. {next_step}") from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(f"{path} cannot be used: {str(error)[:200]}. {next_step}") from error


def _record(found: Any) -> Record:
    def texts(key: str) -> dict[str, str]:
        return {_text(k): _text(v) for k, v in found[key].items()}

    return Record(
        settings=dict(found["settings"]),
        data=texts("data"),
        read=texts("read"),
        wrote=texts("wrote"),
        metrics=[_text(name) for name in found["metrics"]],
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} stands where a text is needed")
    return value


def _inside(value: Any) -> str:
    """Return a name that leads to a place below the folder: others would let files outside go."""
    name = _text(value)
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name[:80]!r} is no place in the folder")
    return name
