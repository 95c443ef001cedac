"""Kill runs and starve them; then compare with the undisturbed run, byte by byte.

``python -m benchmarks.survival`` writes its figures into docs/reliability.md; with ``--quick`` (what the
tests run) there are a handful of kills, and the figures go to standard output as JSON.

A trial is a process forked from this one, which has imported everything but run nothing: it takes what the
command takes, and no import. A hook that Python calls before every file operation counts those in the run
folder, and kills the process in front of the one that was asked for. The product knows nothing of it.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

import resconv.run  # noqa: F401  (what the processes would import else, one by one)
from resconv.cli.app import app, run_app
from resconv.files import OURS

from .page import stamp, table, write_between

QUICK = "--quick" in sys.argv[1:]
RUN = f"{'train' if QUICK else 'compress'} --model tests.noisy:net --data digits --limit 64 "
RUN += "--batch-size 16 --macs 0.6 --epochs 2 --sparse-epochs 5 --finetune-epochs 2 --ema 0.9 --control --out"
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# What a run measures with a clock, or of the machine: no two runs agree in it.
_TIMED = ("seconds", "latency", "measured", "machine", "date", "peak_memory_bytes")
_UNEQUAL = {
    "resconv-run.json",
    "config.json",
    "report.html",
    "README.md",
    "metrics.json",
    "checkpoints.json",
}


@dataclass(frozen=True)
class Trial:
    """How a process ended (a negative status: by that signal), where it was killed, what it said."""

    status: int
    place: str
    output: str

    @property
    def is_killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def is_raw(self) -> bool:
        """Whether the user saw an exception from inside."""
        return "Traceback (most" in self.output or "Unexpected:" in self.output


def try_run(
    folder: Path,
    *more: str,
    at: int | str | None = None,
    after: float = 300,
    tmpdir: Path | None = None,
    limits: dict[int, int] | None = None,
) -> Trial:
    """Run the command on a run folder, and kill it.

    ``at`` is the number of the file operation in ``folder`` (or the end of the path of a move)
    in front of which it is killed, ``after`` a time in seconds; ``limits`` are of its resources.
    """
    with tempfile.TemporaryDirectory() as beside:
        said, place = Path(beside) / "said", Path(beside) / "place"
        said.touch()
        place.touch()
        end = time.monotonic() + after
        child = os.fork()
        if child == 0:
            try:
                for handle in (1, 2):
                    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), handle)
                if tmpdir is not None:
                    os.environ["TMPDIR"] = tempfile.tempdir = str(tmpdir)
                if at is not None:
                    _kill_at(at, str(folder.resolve()), os.open(place, os.O_WRONLY))
                for kind, most in (limits or {}).items():
                    resource.setrlimit(kind, (most, most))
                sys.argv = ["resconv", *RUN.split(), str(folder), *more]
                status = run_app(app)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            finally:
                os._exit(99)
        while not (found := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(found[1])
        return Trial(code, place.read_text(), said.read_text(errors="replace"))


def _kill_at(at: int | str, root: str, place: int) -> None:
    count = 0

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _CHANGES and not (event == "open" and args[2] & _WRITES):
            return
        path = args[1] if event == "os.rename" else args[0]
        if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(root):
            return
        count += 1
        moved = event == "os.rename" and os.fsdecode(path)
        if count == at or (isinstance(at, str) and moved and moved.endswith(at)):
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
    a, b = (json.loads((f / "metrics.json").read_text()) for f in (folder, whole))
    found += [f"metrics: {k}" for k in {*a, *b} - {*_TIMED} if a.get(k) != b.get(k)]
    return found + [str(p) for p in folder.rglob(f"{OURS}*")]


@dataclass
class Tally:
    """What became of one series of kills."""

    what: str
    kills: int = 0
    places: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)

    def note(self, trial: Trial) -> bool:
        """Count the trial, and say whether it was killed."""
        self.kills += trial.is_killed
        self.places += [trial.place] if trial.place else []
        if trial.is_raw or (trial.status and not trial.is_killed):
            self.raw.append(trial.output[-400:])
        return trial.is_killed


@dataclass
class Check:
    """One fault: what was done, what was promised, and whether that is what happened."""

    what: str
    promised: str
    kept: bool
    found: str = ""


def chain(what: str, work: Path, whole: Path, first: int, step: int, **how: Any) -> Tally:
    """Kill a run again and again, every process ``step`` file operations later than the one before it."""
    tally, at = Tally(what), first
    folder = work / f"chain-{what.replace(' ', '-')}-{first}-{step}"
    while tally.note(try_run(folder, at=at, **how)):
        at += step
    tally.differing = differences(folder, whole)
    return tally


def at_times(work: Path, whole: Path, count: int) -> Tally:
    """Kill a run at random times, among others inside what no hook sees: training, writing in C++."""
    tally, clock, folder = Tally("at random times"), random.Random(0), work / "times"
    for _ in range(count):
        tally.note(try_run(folder, after=clock.uniform(0.5, 6)))
    tally.note(try_run(folder))
    tally.differing = differences(folder, whole)
    return tally


def _launch(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "resconv", *RUN.split(), str(folder), "--devices", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def in_two_processes(work: Path) -> tuple[Tally, list[Check]]:
    """Kill the launcher, or one of the two processes that train, and look who is left."""
    tally, checks = Tally("two processes that train"), []
    whole, folder = work / "two-whole", work / "two"
    _launch(whole).communicate()
    for stage, victim in (("dense", "launcher"), ("sparse", "worker"), ("finetune", "launcher")):
        process = _launch(folder)
        while process.poll() is None and not (folder / "logs" / stage / "last.ckpt").is_file():
            time.sleep(0.05)
        if process.poll() is not None:
            tally.raw.append(f"ended before {stage} was stopped: {process.communicate()[0][-400:]}")
            break
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [p for p in family if "--multiprocessing-fork" in p.cmdline()]
        (process if victim == "launcher" else workers[-1]).send_signal(signal.SIGKILL)
        tally.kills += 1
        tally.places.append(f"{victim} in {stage}")
        output = process.communicate()[0]
        _, alive = psutil.wait_procs(workers, timeout=60)
        told = "of the training ended" in output and process.returncode == 2
        kept = not alive and (victim == "launcher" or told)
        what = f"a {victim} of two processes is killed, in the stage {stage}"
        promised = "the others end within a minute, with a word where one can speak"
        checks.append(Check(what, promised, kept, "" if kept else output[-300:]))
    output = _launch(folder).communicate()[0]
    tally.raw += [output[-400:]] if "Traceback" in output or "Unexpected:" in output else []
    tally.differing = differences(folder, whole)
    return tally, checks


@contextmanager
def small_disk(place: Path) -> Iterator[Callable[[str], object] | None]:
    """Mount a small file system where that is allowed, and return how its options are changed."""
    place.mkdir()

    def mount(options: str, *what: str) -> bool:
        command = ["mount", "-o", options, *what, str(place)]
        return subprocess.run(command, capture_output=True).returncode == 0

    mounted = mount("size=64m", "-t", "tmpfs", "tmpfs")
    try:
        yield (lambda options: mount(f"remount,{options}")) if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def starve(work: Path, whole: Path) -> Iterator[Check]:
    """Run under a fault, which is to be said in words; without it the same command finishes the run."""

    def check(what: str, folder: Path, words: str, trial: Trial) -> Check:
        after = try_run(folder)
        wrong = differences(folder, whole) if after.status == 0 else [after.output[-300:]]
        kept = trial.status == 2 and words in trial.output and not trial.is_raw and not wrong
        found = "" if kept else f"status {trial.status}: {trial.output[-300:]} {wrong}"
        promised = "said in words; the same command then gives the undisturbed run's files"
        return Check(what, promised, kept, found)

    with small_disk(work / "disk") as remount:
        folder = work / "disk" / "run"
        for size in ("400k", "700k") if remount else ():
            remount(f"size={size}")
            trial = try_run(folder)
            remount("size=64m")
            yield check(f"a disk of {size} gets full", folder, "No space left", trial)
            shutil.rmtree(folder)
        if remount:
            try_run(folder, at="logs/sparse/last.ckpt")
            remount("ro")
            trial = try_run(folder)
            remount("rw")
            yield check("a disk that cannot be written", folder, "cannot be written", trial)
    size = (whole / "gated.safetensors").stat().st_size
    trial = try_run(work / "limited", limits={resource.RLIMIT_FSIZE: size})
    yield check("files may not grow", work / "limited", "File too large", trial)
    for mib in (6, 24):  # while modules are imported, and while an error is shown
        most = psutil.Process().memory_info().vms + (mib << 20)
        trial = try_run(work / f"memory-{mib}", limits={resource.RLIMIT_AS: most})
        yield check(f"{mib} MiB of memory", work / f"memory-{mib}", "not enough memory", trial)


def main() -> None:
    tallies: list[Tally] = []
    checks: list[Check] = []
    places = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory(dir="/dev/shm")
    with places[0] as name, places[1] as other:
        work = Path(name)
        whole, again = work / "whole", work / "again"
        for trial in (try_run(whole), try_run(again, "--seed", "1")):
            assert not trial.status, trial.output
        told = bool(differences(again, whole))
        checks.append(Check("control: another seed", "is told apart", told))
        noisy = "dropout and stochastic depth"
        if QUICK:
            tallies.append(chain(noisy, work, whole, 20, 25))
            print(json.dumps([[asdict(t) for t in tallies], [asdict(c) for c in checks]]))
            return
        tallies += [chain(noisy, work, whole, first, step) for first, step in ((3, 5), (1, 7))]
        beside = {"tmpdir": Path(other)}
        tallies.append(chain("TMPDIR on another file system", work, whole, 5, 8, **beside))
        tallies.append(at_times(work, whole, 12))
        checks += starve(work, whole)
        tally, more = in_two_processes(work)
        tallies.append(tally)
        checks += more
    for wrong in [w for t in tallies for w in (*t.differing, *t.raw)]:
        print(wrong, file=sys.stderr)
    for check in checks:
        print("" if check.kept else f"{check.what}: {check.found}", file=sys.stderr)
    header = ["series", "kills", "places", "ends with the undisturbed run's files"]
    lines = [
        [
            *(t.what, str(t.kills), str(len(set(t.places)) or "")),
            *("**no**" if t.differing else "yes", str(len(t.raw))),
        ]
        for t in tallies
    ]
    kept = [[c.what, c.promised, "yes" if c.kept else "**no**"] for c in checks]
    parts = (table([*header, "raw exceptions"], lines), table(["done", "promised", "kept"], kept))
    write_between("survival", "\n\n".join([stamp(), *parts]), "reliability.md")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
