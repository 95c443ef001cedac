"""Files that are either whole or not there: written beside, then moved into place."""

import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["write_atomic", "write_text", "write_together"]


def write_together(paths: Sequence[Path], write: Callable[[Sequence[Path]], None]) -> None:
    """Let ``write`` fill temporary files of the same names, and move them in when all are whole.

    All ``paths`` lie in one folder, and the last one is the file that a reader opens first. Of
    several, that one is taken away before the others are replaced: a crash leaves the old files, no
    net at all, or the new files, but never an old file beside a new one. A file in ``paths`` that
    ``write`` does not make is left alone. The files have the permissions of the user's umask.
    """
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{paths[-1].name}.") as beside:
        temporaries = [Path(beside) / p.name for p in paths]
        write(temporaries)
        mode = _usual_mode(Path(beside))
        moves = [(t, p) for t, p in zip(temporaries, paths, strict=True) if t.exists()]
        for temporary, _ in moves:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)
        if len(moves) > 1:
            paths[-1].unlink(missing_ok=True)
        for temporary, path in moves:
            temporary.replace(path)
    _sync_folder(folder)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file of the same name, and move it to ``path`` when whole."""
    write_together([path], lambda temporaries: write(temporaries[0]))


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _usual_mode(folder: Path) -> int:
    """Return the permissions that a new file gets here; some writers make their files private.

    Asked of a new file: the umask itself can only be read by changing it, for all threads at once.
    """
    probe = folder / ".mode"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


def _sync_folder(folder: Path) -> None:
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
