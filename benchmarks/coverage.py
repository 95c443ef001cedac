"""Convert, prune, train, save and export nets of other packages: which ones work.

    python -m benchmarks.coverage [others] [SECONDS] [anew] [onnx] [MODEL ...]

One small variant of every family of timm and all of torchvision; with ``others``, the nets of
benchmarks/zoo.yaml. Appends to benchmarks/results/coverage.jsonl (coverage_others.jsonl), goes on where it
stopped (SECONDS bounds one call; named models or packages are done again, with ``anew`` all whose row is
of another commit), and writes docs/coverage.md from the logs. A first pass does all but the ONNX files, a
second one (with ``onnx`` the only one) writes these, which takes ten times as long: a first pass that is
done again keeps what was found about the file, with its commit. coverage_steps.py says what is tried.

A net has a process of its own, with limits of memory and CPU time: a crash or a hang is a row.
"""

import json
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

from tests.helpers import VARIANCES

from . import coverage_page
from .coverage_steps import Row, one
from .coverage_torch_pruning import torch_pruning
from .run import commit
from .zoo import OTHERS, timm_families, torchvision_sizes

RESULTS = Path(__file__).parent / "results"
LOGS = {False: RESULTS / "coverage.jsonl", True: RESULTS / "coverage_others.jsonl"}
FIRST_PASS = ("faults", "reached", "total_seconds", "commit", "variances")
MEMORY_BYTES, SECONDS, TORCH_PRUNING_SECONDS = 10 * 2**30, 300, 60


def zoo_jobs() -> list[tuple[str, list[str]]]:
    """Return (label, variants), the smallest first.

    The next variant of a family is for one whose smaller variants have nothing to remove.
    """
    found = [(size, name, [name]) for name, size in torchvision_sizes().items()]
    found += [(size, f"timm:{f}", names) for f, (size, names) in timm_families().items()]
    return [(label, names) for _, label, names in sorted(found)]


def other_jobs() -> list[tuple[str, list[str]]]:
    """Return the other packages' nets, the first of each package first."""
    found = [(i, f"{p}:{n}") for p, nets in OTHERS.items() for i, n in enumerate(nets)]
    return [(name, [name]) for _, name in sorted(found, key=lambda f: f[0])]


def apart(name: str, onnx: bool) -> Row:
    """Return the row of one net from a process of its own, what it had sent if that ends early."""
    receive, send = multiprocessing.Pipe(duplex=False)
    forked = multiprocessing.get_context("fork")
    process = forked.Process(target=_child, args=(send, name, onnx))
    process.start()
    send.close()
    row: Row = {}
    end = time.monotonic() + 4 * SECONDS  # a process that only waits spends no time of its own
    try:
        while row.get("step") != "ended" and receive.poll(max(0.0, end - time.monotonic())):
            row = receive.recv()
    except EOFError:
        pass
    process.kill()
    process.join()
    why = f"the process died, or took more than {SECONDS} s of CPU time"
    match row.pop("step"):
        case "torch-pruning":
            why = why.replace(str(SECONDS), str(TORCH_PRUNING_SECONDS))
            row |= {"tp": "hangs or crashes", "tp_reason": why}
        case "ended":
            pass
        case "ONNX":
            row |= {"outcome": "no ONNX from torch", "reason": f"ONNX: {why}"}
        case step:
            row |= {"outcome": "crashed", "reason": f"{step}: {why}", "reached": step}
    return row


def _child(pipe: Connection, name: str, onnx: bool) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    row = one(name, onnx, pipe.send)
    if not onnx and name.partition(":")[0] in OTHERS:
        pipe.send(row | {"step": "torch-pruning"})
        signal.setitimer(signal.ITIMER_VIRTUAL, TORCH_PRUNING_SECONDS)
        row |= torch_pruning(name)
    pipe.send(row | {"step": "ended"})


def read(log: Path) -> dict[str, Row]:
    """Return the newest row of each job."""
    rows = [json.loads(s) for s in log.read_text().splitlines()] if log.is_file() else []
    return {r["job"]: r for r in rows}


def main() -> None:
    warnings.filterwarnings("ignore")
    wanted = set(sys.argv[1:])
    others = "others" in wanted
    jobs = other_jobs() if others else zoo_jobs()
    limit = next((float(a) for a in wanted if a.replace(".", "").isdigit()), float("inf"))
    again = {a for a in wanted if ":" in a or a in OTHERS}
    anew = "anew" in wanted
    log = LOGS[others]
    log.parent.mkdir(parents=True, exist_ok=True)
    last = read(log)
    begun, at = time.monotonic(), commit()
    for onnx in (True,) if "onnx" in wanted else (False, True):
        for label, names in jobs:
            row = last.get(label, {"outcome": ""})
            if again and not again & {label, label.partition(":")[0], *names}:
                continue
            done = row["outcome"] and not (anew and row["commit"] != at)
            due = row["outcome"] == "pruned" if onnx else again or not done
            if not due:
                continue
            if time.monotonic() - begun > limit:
                break
            for name in names[:4]:
                found = apart(name, onnx)
                found |= {"job": label, "commit": at, "variances": VARIANCES}
                if not found.pop("nothing", False):
                    break
            if onnx:  # what the first pass found stays
                found |= {"onnx_commit": at}
                found = row | {k: v for k, v in found.items() if k not in FIRST_PASS}
            elif found["outcome"] == "pruned" and row["outcome"] == "complete":
                found["outcome"] = "complete"
                found |= {k: row[k] for k in ("onnx_error", "onnx_seconds")}
                found["onnx_commit"] = row.get("onnx_commit", row["commit"])
            last[label] = found
            with log.open("a") as file:
                file.write(json.dumps(found) + "\n")
            shown = (found.get(k, "") for k in ("outcome", "model", "reason", "faults", "tp"))
            print(*shown, flush=True)
    write = coverage_page.write_others if others else coverage_page.write
    write(list(last.values()), [label for label, _ in jobs])


if __name__ == "__main__":
    main()
