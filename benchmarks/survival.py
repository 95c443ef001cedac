"""Kill runs, starve them and let two meet; then compare with the undisturbed run, byte by byte.

``python -m benchmarks.survival`` writes its figures into docs/reliability.md; with ``--quick`` (what the
tests run) there are a handful of kills, and the figures go to standard output as JSON.
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

import psutil

from .page import stamp, table, write_between
from .trials import Trial, differences, try_command

__all__ = ["main"]

QUICK = "--quick" in sys.argv[1:]
RUN = [
    *(("train" if QUICK else "compress"), "--model", "benchmarks.noisy:net", "--data", "digits"),
    *(
        "--limit",
        "64",
        "--batch-size",
        "16",
        "--macs",
        "0.6",
        "--epochs",
        "2",
        "--sparse-epochs",
        "5",
    ),
    *("--finetune-epochs", "2", "--out"),
]


@dataclass
class Tally:
    """What became of one series of kills."""

    what: str
    kills: int = 0
    places: list[str] = field(default_factory=list)
    runs: int = 0
    differing: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)

    def note(self, trial: Trial) -> None:
        self.kills += trial.is_killed
        if trial.place:
            self.places.append(trial.place)
        if trial.is_raw or (trial.status and not trial.is_killed):
            self.raw.append(trial.output[-400:])

    def end(self, folder: Path, whole: Path) -> None:
        self.runs += 1
        self.differing += differences(folder, whole)


@dataclass
class Check:
    """One fault: what was done, what was promised, and whether that is what happened."""

    what: str
    promised: str
    kept: bool
    found: str = ""


def chain(
    what: str, work: Path, whole: Path, first: int, step: int, tmpdir: Path | None = None
) -> Tally:
    """Kill a run again and again, every process ``step`` file operations later than the one before it."""
    tally, at = Tally(what), first
    folder = work / f"chain-{what.replace(' ', '-')}-{first}-{step}"
    while True:
        trial = try_command([*RUN, str(folder)], folder, at=at, tmpdir=tmpdir)
        tally.note(trial)
        if not trial.is_killed:
            tally.end(folder, whole)
            return tally
        at += step


def at_times(work: Path, whole: Path, count: int) -> Tally:
    """Kill a run at random times, among others inside what no hook sees: training, writing in C++."""
    tally, clock, folder = Tally("at random times"), random.Random(0), work / "times"
    for _ in range(count):
        tally.note(try_command([*RUN, str(folder)], folder, after=clock.uniform(0.5, 6)))
    tally.note(try_command([*RUN, str(folder)], folder))
    tally.end(folder, whole)
    return tally


def _launch(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "resconv", *RUN, str(folder), "--devices", "2"]
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
        start = time.monotonic()
        output = process.communicate()[0]
        _, alive = psutil.wait_procs(workers, timeout=60)
        passed = time.monotonic() - start
        words = victim == "launcher" or (
            "of the training ended" in output and process.returncode == 2
        )
        kept = not alive and words
        checks.append(
            Check(
                f"a {victim} of two processes is killed, in the stage {stage}",
                "the others end within a minute, with a word where one can speak",
                kept,
                f"{passed:.1f} s" if kept else output[-300:],
            )
        )
    output = _launch(folder).communicate()[0]
    if "Traceback" in output or "Unexpected:" in output:
        tally.raw.append(output[-400:])
    tally.end(folder, whole)
    return tally, checks


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[bool]:
    """Mount a file system of ``size`` where that is allowed."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def _refused_then(
    what: str,
    folder: Path,
    whole: Path,
    words: str,
    ill: Callable[[], Trial],
    mend: Callable[[], object],
) -> Check:
    """Run under a fault, which is to be said in words; without it the same command finishes the run."""
    trial = ill()
    mend()
    after = try_command([*RUN, str(folder)], folder)
    wrong = differences(folder, whole) if after.status == 0 else [after.output[-300:]]
    kept = trial.status == 2 and words in trial.output and not trial.is_raw and not wrong
    found = "" if kept else f"status {trial.status}: {trial.output[-300:]} {wrong}"
    return Check(
        what, "said in words; the same command then gives the undisturbed run's files", kept, found
    )


def starve(work: Path, whole: Path) -> list[Check]:
    """A full disk, one that cannot be written, a limit on files and on memory."""
    checks = []
    with small_disk(work / "disk", "400k") as mounted:
        folder = work / "disk" / "run"
        command = [*RUN, str(folder)]

        def remount(options: str) -> None:
            place = str(work / "disk")
            subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)

        def unwritable() -> Trial:
            remount("ro")
            return try_command(command, folder)

        if mounted:
            for size in ("400k", "700k"):
                full, more = (lambda: try_command(command, folder)), (lambda: remount("size=64m"))
                what = f"a disk of {size} gets full"
                remount(f"size={size}")
                checks.append(_refused_then(what, folder, whole, "No space left", full, more))
                shutil.rmtree(folder)
            try_command(command, folder, at="logs/sparse/last.ckpt")
            rw = lambda: remount("rw")  # noqa: E731
            checks.append(
                _refused_then(
                    "a disk that cannot be written",
                    folder,
                    whole,
                    "cannot be written",
                    unwritable,
                    rw,
                )
            )
    folder = work / "limited"

    def limited() -> Trial:
        size = (whole / "gated.safetensors").stat().st_size
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
        return try_command([*RUN, str(folder)], folder, prepare=limit)

    checks.append(
        _refused_then("files may not grow", folder, whole, "File too large", limited, lambda: None)
    )
    folder = work / "memory"

    def little() -> Trial:
        most = psutil.Process().memory_info().vms + (24 << 20)
        limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most))  # noqa: E731
        return try_command([*RUN, str(folder)], folder, prepare=limit)

    checks.append(
        _refused_then("24 MiB of memory", folder, whole, "not enough memory", little, lambda: None)
    )
    return checks


def meet(work: Path, whole: Path) -> list[Check]:
    """The same command twice at once, and commands on folders and files that are not the run's."""
    folder = work / "both"
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "resconv", *RUN, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [c.communicate()[0] for c in commands]
    codes = sorted(c.returncode for c in commands)
    wrong = differences(folder, whole)
    kept = codes == [0, 2] and any("in use by process" in o for o in outputs) and not wrong
    checks = [
        Check(
            "the same command twice at once",
            "one runs, the other says who has the folder",
            kept,
            "" if kept else f"{codes} {wrong} {outputs}",
        )
    ]
    foreign = work / "foreign"
    foreign.mkdir()
    before = {"config.json": '{"architectures": ["X"]}', "thesis.tex": "years of work"}
    for name, text in before.items():
        (foreign / name).write_text(text)
    for fresh in ([], ["--fresh"]):
        trial = try_command([*RUN, str(foreign), *fresh], foreign)
        left = {p.name: p.read_text() for p in foreign.iterdir()}
        checks.append(
            Check(
                f"a folder of someone else{' with --fresh' if fresh else ''}",
                "refused, and not touched",
                trial.status == 2 and left == before,
                "" if left == before else str(sorted(left)),
            )
        )
    return checks


def damage(work: Path, whole: Path) -> list[Check]:
    """Flip one byte of what a stopped run is to go on from."""
    checks = []
    start = work / "stopped"
    try_command([*RUN, str(start)], start, at="plan.json")
    half = work / "half"
    try_command([*RUN, str(half)], half, at="finetune/checkpoints.json")
    for name, origin, refused in (
        ("logs/sparse/last.ckpt", work / "early", False),
        ("dense.safetensors", start, True),
        ("gated.safetensors", start, True),
        ("plan.json", half, True),
    ):
        if not origin.is_dir():
            for n in range(3):  # stopped after the third checkpoint of sparse training
                try_command(
                    [*RUN, str(origin)],
                    origin,
                    at="logs/sparse/previous.ckpt" if n else "logs/sparse/last.ckpt",
                )
        folder = work / f"damaged-{Path(name).name}"
        shutil.copytree(origin, folder)
        path = folder / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        trial = try_command([*RUN, str(folder)], folder)
        kept = (
            (trial.status == 2 and name in trial.output.replace("\n", ""))
            if refused
            else (
                trial.status == 0
                and "is not used" in trial.output
                and not differences(folder, whole)
            )
        )
        promised = "refused, named" if refused else "said; the one before it is used, same result"
        checks.append(
            Check(
                f"one bit of {name} is flipped", promised, kept, "" if kept else trial.output[-500:]
            )
        )
    return checks


def main() -> None:
    tallies: list[Tally] = []
    checks: list[Check] = []
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as other,
    ):
        work = Path(name)
        whole, again = work / "whole", work / "again"
        try_command([*RUN, str(whole)], whole)
        try_command([*RUN, str(again), "--seed", "1"], again)
        told = bool(differences(again, whole))
        checks.append(Check("control: another seed", "is told apart", told))
        if QUICK:
            tallies.append(chain("dropout and stochastic depth", work, whole, 20, 25))
            print(json.dumps([[asdict(t) for t in tallies], [asdict(c) for c in checks]]))
            return
        # The figures are written after every part: the whole takes a while.
        for first, step in ((3, 5), (1, 7)):
            tallies.append(chain("dropout and stochastic depth", work, whole, first, step))
            _report(tallies, checks)
        tallies.append(chain("TMPDIR on another file system", work, whole, 5, 8, Path(other)))
        tallies.append(at_times(work, whole, 12))
        _report(tallies, checks)
        for part in (damage, meet, starve):
            checks += part(work, whole)
            _report(tallies, checks)
        tally, more = in_two_processes(work)
        tallies.append(tally)
        checks += more
        _report(tallies, checks)
    for wrong in [d for t in tallies for d in (*t.differing, *t.raw)]:
        print(wrong, file=sys.stderr)
    for check in checks:
        if not check.kept:
            print(f"{check.what}: {check.found}", file=sys.stderr)


def _report(tallies: list[Tally], checks: list[Check]) -> None:
    total = [t for t in tallies if t.runs]
    rows = [
        [
            t.what,
            str(t.kills),
            str(len(set(t.places))) if t.places else "",
            "yes" if t.runs and not t.differing else "**no**",
            str(len(t.raw)),
        ]
        for t in tallies
    ]
    same = sum(not t.differing for t in total)
    all_raw = sum(len(t.raw) for t in tallies)
    kills = sum(t.kills for t in tallies)
    rows.append(["all", str(kills), "", f"{same} of {len(tallies)} series", str(all_raw)])
    header = [
        "series",
        "kills",
        "places",
        "ends with the undisturbed run's files",
        "raw exceptions",
    ]
    faults = [[c.what, c.promised, "yes" if c.kept else "**no**"] for c in checks]
    first = table(header, rows)
    second = table(["what was done", "promised", "kept"], faults)
    write_between("survival", "\n\n".join([stamp(), first, second]), "reliability.md")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
