"""Files that are either whole or not there: written beside, then moved into place."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = [
    "OURS",
    "PART",
    "digest",
    "sweep",
    "sync_folder",
    "write_atomic",
    "write_text",
    "write_together",
]

# What begins so is ours: a folder that holds nothing else counts as empty.
OURS = ".resconv-"
# And this is a folder with files that are not whole.
PART = f"{OURS}part-"


def write_together(paths: Sequence[Path], write: Callable[[Sequence[Path]], None]) -> None:
    """Let ``write`` fill temporary files of the same names, and move them in when all are whole.

    All ``paths`` lie in one folder, and the last one is the file that a reader opens first. Of
    several, that one is taken away before the others are replaced: a crash leaves the old files, no
    net at all, or the new files, but never an old file beside a new one. A file in ``paths`` that
    ``write`` does not make is left alone. The temporary files lie in the same folder, never in
    TMPDIR: only within a file system is a move all or nothing. The files have the permissions of
    the user's umask.
    """
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=PART) as beside:
        probe = Path(beside) / f"{OURS}mode"
        probe.touch()
        mode = probe.stat().st_mode & 0o777  # what the user's umask leaves; writers differ
        temporaries = [Path(beside) / p.name for p in paths]
        write(temporaries)
        moves = [(t, p) for t, p in zip(temporaries, paths, strict=True) if t.exists()]
        for temporary, _ in moves:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)
        if len(moves) > 1:
            paths[-1].unlink(missing_ok=True)
        for temporary, path in moves:
            temporary.replace(path)
    sync_folder(folder)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file of the same name, and move it to ``path`` when whole."""
    write_together([path], lambda temporaries: write(temporaries[0]))


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def digest(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path) -> int:
    """Remove what killed processes left half written in ``folder``, and return how many it was."""
    if folder.is_symlink() or not folder.is_dir():
        return 0
    found = [
        p for p in folder.iterdir() if p.name.startswith(PART) and p.is_dir() and not p.is_symlink()
    ]
    for part in found:
        shutil.rmtree(part, ignore_errors=True)  # which follows no links
    return len(found)


def sync_folder(folder: Path) -> None:
    """Make the renames last through a loss of power, where the system lets a folder be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
