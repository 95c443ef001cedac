"""A new run in the place of an earlier one, which is moved aside; nothing is deleted.

The new run is begun inside the folder, under a name of ours, and checked there. Then the earlier
run's files move to ``earlier-1`` (or 2, ...), its mark last, and the new ones up, their mark last. A
note says where to, so that a process that is killed meanwhile is followed by one that goes on.
"""

import json
import os
import shutil
from pathlib import Path

from msgspec import Struct

from resconv.errors import RunError
from resconv.files import OURS, sync_folder, write_text
from resconv.json_files import read_json

from .mark import MARK, Mark

__all__ = ["complete", "discard", "go_on", "is_under_way", "make_room"]

_NEW = f"{OURS}new"
_NOTE = f"{OURS}exchange.json"


class _Note(Struct):
    to: str


def make_room(path: Path) -> Path:
    """Return an empty folder inside ``path`` for the new run to begin in."""
    discard(path)
    (path / _NEW).mkdir()
    return path / _NEW


def discard(path: Path) -> None:
    """Forget the new run; the earlier one stays as it was."""
    new = path / _NEW
    if not new.is_symlink() and new.is_dir():
        shutil.rmtree(new)


def is_under_way(path: Path) -> bool:
    """Whether a process was killed while it exchanged the runs."""
    return (path / _NOTE).is_file()


def complete(path: Path) -> Path:
    """Put the new run in the place of the earlier one, and return where that is now.

    Raises:
        RunError: a file that is not the earlier run's is in the way, or the system refuses a move.
    """
    old, new = Mark.read(path), Mark.read(path / _NEW)
    for name in new.files:
        if name not in old.files and os.path.lexists(path / name):
            raise RunError(
                f"{path / name} is not of the earlier run, and the new one would write over it. Move "
                "it away, or choose another --out."
            )
    number = 1
    while os.path.lexists(path / f"earlier-{number}"):
        number += 1
    write_text(path / _NOTE, json.dumps({"to": f"earlier-{number}"}))
    return _carry_out(path)


def go_on(path: Path) -> None:
    """Finish an exchange that was cut short, or forget a new run that was never accepted."""
    if is_under_way(path):
        _carry_out(path)
    else:
        discard(path)


def _carry_out(path: Path) -> Path:
    try:
        name = read_json(path / _NOTE, _Note, RunError).to
        if Path(name).name != name or not name.startswith("earlier-"):
            raise RunError(f"{path / _NOTE} does not name a folder of an earlier run.")
    except RunError as error:
        raise RunError(f"{error} Choose another --out.") from error
    aside, new = path / name, path / _NEW
    try:
        # The folder's own mark is the earlier run's until that has moved; then there is none until
        # the new one has come.
        if (new / MARK).is_file():
            if (path / MARK).is_file():
                _move(path, aside, Mark.read(path).files)
            _move(new, path, Mark.read(new).files)
        (path / _NOTE).unlink()
        discard(path)
    except OSError as error:
        raise RunError(
            f"The earlier run in {path} cannot be moved aside to {aside}: {error}. The same command "
            "goes on with that."
        ) from error
    return aside


def _move(source: Path, target: Path, names: list[str]) -> None:
    """Move the named files, the mark last; links are moved, not followed."""
    for name in [*names, MARK]:
        old = source / name
        parents = list(old.parents)[: len(Path(name).parts) - 1]
        if os.path.lexists(old) and not any(p.is_symlink() for p in parents):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(old, target / name)
    sync_folder(source)
    sync_folder(target)
