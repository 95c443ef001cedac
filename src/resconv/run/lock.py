"""One process owns a run folder: a lock that its holder's death gives back."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from resconv.errors import RunError
from resconv.files import OURS

try:
    import fcntl
except ImportError:  # Windows: what the file says has to do
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "locked"]

LOCK = f"{OURS}lock"
# What this process holds: the file, its inode and how often it was asked for.
_held: dict[Path, tuple[int, int, int]] = {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own ``folder`` for the time of the block; what this process owns already it may ask for again.

    The system's lock on the file decides, which no dead process holds. Where the file system has
    none, what the file says does: host, process and the time that it started at.

    Raises:
        RunError: another process owns it; the message says which.
    """
    path = folder.resolve() / LOCK
    handle, inode, count = _held.get(path, (-1, -1, 0))
    if count and not _is_at(path, inode):  # the folder was deleted and made anew
        os.close(handle)
        count = 0
    if not count:
        handle, inode = _take(path)
    _held[path] = (handle, inode, count + 1)
    try:
        yield
    finally:
        handle, inode, count = _held.pop(path)
        if count > 1:
            _held[path] = (handle, inode, count - 1)
        else:
            if _is_at(path, inode):
                path.unlink(missing_ok=True)
            os.close(handle)


def _take(path: Path) -> tuple[int, int]:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            owner = _read(handle)
            if not _lock(handle, owner):
                raise RunError(
                    f"{path.parent} is in use by {_words(owner)}. Wait for it, stop it, or choose "
                    "another --out."
                )
            inode = os.fstat(handle).st_ino
            if _is_at(path, inode):  # else its holder took the file away meanwhile
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, json.dumps(_self()).encode())
                return handle, inode
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, owner: dict[str, Any]) -> bool:
    """Return whether the lock was got."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks
    if not owner or owner == _self():
        return True
    if owner.get("host") != socket.gethostname():
        return False
    return not _lives(owner)


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process is there still, and is not another one with its number."""
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 2)
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return False


def _self() -> dict[str, Any]:
    started = psutil.Process().create_time()
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _read(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.read(handle, 4096))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _words(owner: dict[str, Any]) -> str:
    try:
        started = datetime.fromtimestamp(owner["started"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        return (
            f"process {int(owner['pid'])} on {str(owner['host'])[:80]!r}, started at {started} UTC"
        )
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return "another process"


def _is_at(path: Path, inode: int) -> bool:
    try:
        return os.stat(path, follow_symlinks=False).st_ino == inode
    except OSError:
        return False
