"""Change files at random and open them as the commands do: ``python -m benchmarks.fuzz``.

Every mutant is made from a seed and its number, so any one can be made again. They are opened in
processes with bounded memory, each in at most 20 seconds. Counted are exceptions that are no
ResConvError (and processes that die), code that ran, nets that were taken for others or changed by a
refusal, and refusals of more than 2 s (of processor time) or 1 GiB. The counts are kept in
``benchmarks/results/fuzz.json`` and written into ``docs/reliability.md``; a later call goes on.
"""

import argparse
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from .mutants import CANARY, KINDS
from .page import table, write_between

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
GOAL = 24_000
SECONDS, GIB = 2.0, 2**30
_PATIENCE = 20.0  # seconds of the clock until a mutant counts as hanging
COUNTED = ("mutants", "refused", "loaded", "raw", "executed", "wrong", "slow", "large")
# What code hidden in a file would have to do, sooner or later; ctypes asks for a library at import.
_EVENTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.", "socket.connect")
_seen: list[str] = []


def _watch(event: str, args: Any) -> None:
    if event.startswith(_EVENTS) or (event == "os.mkdir" and CANARY in str(args)):
        _seen.append(event)


def _peak(reset: bool = False) -> int:
    """Return the most memory that this process held since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def open_mutant(name: str, folder: Path) -> dict[str, Any]:
    """Open a changed file, and say how that ended, with its processor time and memory."""
    from resconv.errors import ResConvError

    kind = KINDS[name]
    _seen.clear()
    before, start = _peak(reset=True), time.process_time()
    found: dict[str, Any] = {"end": "loaded", "bad": []}
    try:
        fault = kind.read(folder)
        if fault:
            found["bad"].append("wrong")
            found["what"] = fault
    except ResConvError as error:
        found["end"] = "refused"
        text = str(error)
        if not all(c == "\n" or c.isprintable() for c in text):
            found["bad"].append("raw")
            found["what"] = f"a message with control characters: {text[:200]!r}"
    except BaseException as error:
        found["end"] = "raw"
        found["bad"].append("raw")
        found["what"] = f"{type(error).__name__}: {str(error)[:200]}"
    found["seconds"] = time.process_time() - start
    found["bytes"] = max(0, _peak() - before)
    if _seen or (folder / CANARY).exists() or Path(CANARY).exists():
        found["bad"].append("executed")
        found["what"] = str(_seen[:3])
    if found["end"] != "loaded":
        found["bad"] += ["slow"] * (found["seconds"] > SECONDS) + ["large"] * (found["bytes"] > GIB)
    return found


def work(name: str, first: int, count: int) -> None:
    """Open mutants one after another, a line of JSON for each on standard output."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        folder = Path(place) / "files"
        folder.mkdir()
        target = kind.make(folder)
        good = target.read_bytes()
        try:
            kind.read(folder)  # loads what is loaded once
        except Exception as error:
            if "trust" not in str(error):
                raise
        sys.addaudithook(_watch)
        resource.setrlimit(resource.RLIMIT_DATA, (8 * GIB, 8 * GIB))
        with open(os.devnull, "w") as nowhere:  # decoders written in C speak up
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        print("ready", file=out, flush=True)
        for number in range(first, first + count):
            target.write_bytes(kind.mutate(good, random.Random(f"{name} {number}")))
            print(json.dumps(open_mutant(name, folder)), file=out, flush=True)


def _run(name: str, first: int, count: int, until: float) -> list[dict[str, Any]]:
    """Let one process open mutants, and return how each ended; the last one, if it died of it."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--work", name, str(first), str(count)]
    ends: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = process.stdout.readline().strip() == "ready"
        while ready and len(ends) < count and time.monotonic() < until:
            if not select.select([process.stdout], [], [], _PATIENCE)[0]:
                ends.append({"end": "raw", "bad": ["raw", "slow"], "what": "hangs"})
                break
            line = process.stdout.readline()
            if not line:
                status = process.wait()
                ends.append({"end": "raw", "bad": ["raw"], "what": f"process died: {status}"})
                break
            ends.append(json.loads(line))
        process.kill()
    if not ready:
        raise SystemExit(f"{name}: the process did not start")
    return ends


def fuzz(seconds: float) -> dict[str, Any]:
    """Go on where the last call stopped, for so long or until there are ``GOAL`` mutants."""
    state: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    until, shares = time.monotonic() + seconds, sum(k.share for k in KINDS.values())
    zeros = {**dict.fromkeys(COUNTED, 0), "most_seconds": 0.0, "most_mib": 0.0}
    while time.monotonic() < until:
        have = {n: state.get(n, zeros)["mutants"] for n in KINDS}
        left = {n: GOAL * k.share / shares - have[n] for n, k in KINDS.items()}
        name = max(KINDS, key=lambda n: left[n] / KINDS[n].share)
        if left[name] <= 0:
            break
        row = state.setdefault(name, {**zeros, "faults": {}})
        for end in _run(name, row["mutants"], int(min(3000, left[name] + 1)), until):
            for key in {"mutants", end["end"], *end["bad"]}:
                row[key] += 1
            if end["bad"]:
                what = f"{', '.join(end['bad'])}: {end.get('what', '')}"
                row["faults"][str(row["mutants"] - 1)] = what
            if end["end"] == "refused":
                row["most_seconds"] = max(row["most_seconds"], round(end["seconds"], 2))
                row["most_mib"] = max(row["most_mib"], round(end["bytes"] / 2**20))
        RESULTS.write_text(json.dumps(state, indent=1) + "\n")
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work[0], int(given.work[1]), int(given.work[2]))
        return
    state = fuzz(given.seconds)
    lines = [
        [
            *(name, *(f"{row[k]:,}" for k in COUNTED)),
            *(f"{row['most_seconds']:.2f}", f"{row['most_mib']:.0f}"),
        ]
        for name, row in state.items()
    ]
    sums = (f"{sum(row[k] for row in state.values()):,}" for k in COUNTED)
    lines.append(["all", *sums, "", ""])
    write_between("fuzz", table(["file", *COUNTED, "most s", "most MiB"], lines), "reliability.md")
    for name, row in state.items():
        for number, what in row["faults"].items():
            print(f"{name} {number}: {what}")


if __name__ == "__main__":
    main()
