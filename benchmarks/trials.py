"""One command in a process of its own, which is killed at a file operation, or starved.

The processes are forked from this one, which has imported everything but run nothing: a trial takes
what the command takes, and no import. A hook that Python calls before every file operation counts those
in the run folder, and kills the process in front of the one that was asked for. The product knows nothing
of it.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resconv.run  # noqa: F401  (what the processes would import else, one by one)
from resconv.cli.app import app, run_app
from resconv.files import OURS

__all__ = ["Trial", "differences", "try_command"]

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# What a run measures with a clock, or of the machine: no two runs agree in it.
_TIMED = ("seconds", "latency", "measured", "machine", "date", "peak_memory_bytes")
_UNEQUAL = {"resconv-run.json", "config.json", "report.html", "metrics.json", "checkpoints.json"}


@dataclass(frozen=True)
class Trial:
    """How a process ended (a negative status: by that signal), where it was killed, what it said."""

    status: int
    place: str
    output: str
    seconds: float

    @property
    def is_killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def is_raw(self) -> bool:
        """Whether the user saw an exception from inside."""
        return "Traceback (most" in self.output or "Unexpected:" in self.output


def try_command(
    given: Sequence[str],
    folder: Path,
    *,
    at: int | str | None = None,
    after: float | None = None,
    tmpdir: Path | None = None,
    prepare: Callable[[], None] | None = None,
    limit: float = 300,
) -> Trial:
    """Run ``resconv GIVEN`` on a run folder, and kill it.

    ``at`` is the number of the file operation in ``folder`` (or the end of the path of a move)
    in front of which it is killed, ``after`` a time in seconds.
    """
    with tempfile.TemporaryDirectory() as beside:
        said, place = Path(beside) / "said", Path(beside) / "place"
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                _be_command(given, folder, at, tmpdir, prepare, said, place)
            finally:
                os._exit(99)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            passed = time.monotonic() - start
            if done:
                break
            if passed > (limit if after is None else after):
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        read = [p.read_text(errors="replace") if p.is_file() else "" for p in (said, place)]
        return Trial(os.waitstatus_to_exitcode(status), read[1], read[0], passed)


def _be_command(
    given: Sequence[str],
    folder: Path,
    at: int | str | None,
    tmpdir: Path | None,
    prepare: Callable[[], None] | None,
    said: Path,
    place: Path,
) -> None:
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if tmpdir is not None:
        os.environ["TMPDIR"] = tempfile.tempdir = str(tmpdir)
    sys.argv = ["resconv", *given]
    if at is not None:
        _kill_at(at, str(folder.resolve()), os.open(place, os.O_WRONLY | os.O_CREAT))
    if prepare is not None:
        prepare()
    status = run_app(app)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _kill_at(at: int | str, root: str, place: int) -> None:
    count = 0

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event != "open" and event not in _CHANGES:
            return
        if event == "open" and not (args[2] & _WRITES):
            return
        path = args[1] if event == "os.rename" else args[0]
        if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(root):
            return
        count += 1
        hit = count == at
        if isinstance(at, str):
            hit = event == "os.rename" and os.fsdecode(path).endswith(at)
        if hit:
            os.write(place, f"{event} {os.path.relpath(os.fsdecode(path), root)}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def differences(folder: Path, whole: Path) -> list[str]:
    """Return in what a run differs from the undisturbed one, byte by byte, and what it left behind."""
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (folder, whole)]
    found = [f"only in one: {n}" for n in names[0] ^ names[1] if "previous" not in n]
    for name in names[0] & names[1]:
        if Path(name).name in _UNEQUAL or name.endswith((".ckpt", ".onnx")):
            continue
        if (folder / name).read_bytes() != (whole / name).read_bytes():
            found.append(name)
    metrics = [json.loads((f / "metrics.json").read_text()) for f in (folder, whole)]
    found += [
        f"metrics: {k}"
        for k in {*metrics[0], *metrics[1]} - {*_TIMED}
        if metrics[0].get(k) != metrics[1].get(k)
    ]
    return found + [str(p) for p in folder.rglob(f"{OURS}*")]
