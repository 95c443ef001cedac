"""docs/coverage.md from the rows of the sweep: the rates, what failed and why, every model."""

from collections import Counter
from typing import Any

from .page import stamp, table, write_section
from .zoo import TORCH_PRUNING

__all__ = ["write", "write_others"]

Row = dict[str, Any]
PAGE = "coverage.md"
RIGHT = ("complete", "pruned", "no ONNX from torch")
OUTCOMES = (*RIGHT, "unstable", "refused", "wrong", "crashed")
COLUMNS = ("model", "input", "units", "removed", "alone", "convert", "prune", "ONNX error", "power")
COLUMNS += ("backward", "pickle", "save", "Torch-Pruning", "surgery", "ONNX", "outcome")
KINDS = ("refused by convert", "refused by prune", "does not run", "wrong", "not trained")
KINDS += ("not loaded", "unstable", "no ONNX", "crashed")
FAULTS = {"prune": "refused by prune", "run": "does not run", "wrong": "wrong"}
FAULTS |= {"backward": "not trained", "pickle": "not loaded", "save": "not loaded"}
ABOUT = {
    "torchvision": "Detectors run up to their boxes: maps and heads, no selection "
    "(benchmarks/zoo.py says why). ",
    "timm": "The smallest variant of each family that has something to remove; a family is a "
    "module of timm and the first word of a name, and has a convolution that overlaps. ",
}
RATES = """
`complete`: converted, pruned, written as ONNX and run by ONNX Runtime, each step within 1e-4 \
(relative, float32) of what went in. `pruned`: the file was not tried yet. `no ONNX from torch`: \
pruned within it, and torch's exporter cannot write the dense net either. `unstable`: past 1e-4 in \
float32, within 1e-10 in float64. `refused`: an error that names the reason, nothing written. \
`other faults`: of the training pass, pickle, save and units alone, listed below; rows of older \
commits did not try these. Torch-Pruning prunes {pruned} of the {listed} models of its list by its \
own page (benchmarks/prunability/readme.md), which checks that the pruned net runs, not what it \
computes.

Largest errors: convert {convert_error:.0e}, prune {prune_error:.0e}, ONNX {onnx_error:.0e}. Of the \
models, {moving} of {tried} move by more than 1e-3 when any one of six units' scales is 0.5 off \
(`power`), so a forgotten factor shows."""
OTHERS = """
`refused by convert`: no unit, with the reason, before any training. `refused by prune`: a unit that \
convert gave a gate cannot be removed, in half of the units, all or one alone. `does not run`, \
`wrong`: the pruned net. `not trained`: a training pass of the gated net, of the pruned one or of \
its training form fails where the dense net's does not. `not loaded`: pickle in a new process, or \
resconv.load. Torch-Pruning removes half of the channels by magnitude; `runs` says that the result \
runs, not what it computes."""


def write(rows: list[Row], labels: list[str]) -> None:
    """Write the zoos' part from the rows; ``labels`` are all that the sweep will have run."""
    rows = sorted((r for r in rows if r["job"] in labels), key=lambda r: r["job"])
    listed = [f"torchvision:{n}" for names in TORCH_PRUNING.values() for n in names]
    groups = {
        "torchvision, every model": [n for n in labels if n.startswith("torchvision:")],
        "timm, one a family": [n for n in labels if n.startswith("timm:")],
        "the list Torch-Pruning publishes": listed,
    }
    power = [r["power"] for r in rows if "power" in r]
    errors = ("convert_error", "prune_error", "onnx_error")
    numbers = {k: max((r[k] for r in rows if k in r), default=0.0) for k in errors}
    numbers |= {"pruned": len(TORCH_PRUNING["pruned"]), "listed": len(listed), "tried": len(power)}
    commits = "; ".join(
        f"{n} models at commit {commit} (BatchNorm variances moved by factors in [{a:g}, {b:g}])"
        for (commit, a, b), n in Counter((r["commit"], *r["variances"]) for r in rows).most_common()
    )
    header = ["", "models", "not run yet", *OUTCOMES, "other faults", "all pruned"]
    lines = [_rates(title, rows, some) for title, some in groups.items()]
    about = RATES.format(**numbers, moving=sum(p > 1e-3 for p in power))
    text = f"{stamp('python -m benchmarks.coverage')} {commits}.{_older_files(rows)}\n\n"
    text += table([*header, "right in ONNX Runtime"], lines) + f"\n{about}"
    write_section("Rates", text, PAGE)
    write_section("Not complete", _reasons(rows), PAGE)
    for zoo, about in ABOUT.items():
        about += "A random half of the units removed; errors are relative to the largest output. "
        about += "`surgery` is convert and prune, `ONNX` the export with its checks, in seconds."
        mine = [r for r in rows if r["model"].startswith(f"{zoo}:")]
        write_section(zoo, f"{about}\n\n{_every(mine)}", PAGE)


def write_others(rows: list[Row], labels: list[str]) -> None:
    """Write what became of the nets of other packages; ``labels`` are all that there are."""
    rows = sorted((r for r in rows if r["job"] in labels), key=lambda r: r["job"].lower())
    kinds = Counter(kind for r in rows for kind in _kinds(r))
    theirs = Counter(r.get("tp", "not run") for r in rows).most_common()
    lines = [["done: all steps right", str(sum(not _kinds(r) for r in rows))]]
    lines += [[name, str(kinds[name])] for name in (*KINDS, *sorted(set(kinds) - set(KINDS)))]
    lines += [[f"Torch-Pruning 1.6.1: {name}", str(n)] for name, n in theirs]
    commits = Counter(r["commit"] for r in rows).most_common()
    packages = len({r["job"].split(":")[0] for r in rows})
    text = f"{stamp('python -m benchmarks.coverage others')} "
    text += "; ".join(f"{n} nets at commit {c}" for c, n in commits)
    text += f".{_older_files(rows)} {len(rows)} of {len(labels)} nets, of {packages} packages; a net can be in several "
    text += f"lines.\n\n{table(['', f'nets of {len(rows)}'], lines)}\n{OTHERS}"
    write_section("Other packages", text, PAGE)
    write_section("Other packages: not done", _reasons(rows), PAGE)
    about = "A random half of the units removed; `alone`: units that were removed one by one, of "
    about += "those tried; backward, pickle: the nets that fail.\n\n"
    write_section("Other packages: every net", about + _every(rows), PAGE)


def _older_files(rows: list[Row]) -> str:
    """Say how many ONNX files were written and run by an earlier commit than the rest of their row."""
    tried = [r for r in rows if "onnx_error" in r]
    older = sum(r.get("onnx_commit", r["commit"]) != r["commit"] for r in tried)
    return f" {older} of {len(tried)} ONNX files are of an earlier commit." if older else ""


def _rates(title: str, rows: list[Row], labels: list[str]) -> list[str]:
    mine = [r for r in rows if r["job"] in labels]
    counts = Counter(r["outcome"] for r in mine)
    pruned = sum(counts[k] for k in RIGHT)
    shares = ((pruned, len(mine)), (counts["complete"], pruned - counts["pruned"]))
    return [
        *(title, str(len(labels)), str(len(labels) - len(mine))),
        *(str(counts[k]) for k in OUTCOMES),
        str(sum(bool(r.get("faults")) for r in mine)),
        *(f"{a} of {b} ({100 * a / max(1, b):.1f} %)" for a, b in shares),
    ]


def _reasons(rows: list[Row]) -> str:
    found = [[r["model"], kind, _cell(why)] for r in rows for kind, why in _kinds(r).items()]
    return table(["net", "what", "reason"], found)


def _kinds(row: Row) -> dict[str, str]:
    """Return every way in which a net is not done, with the reason."""
    found: dict[str, str] = {}
    reason = row.get("reason", "")
    match row["outcome"]:
        case "refused" if reason.startswith("ONNX"):
            found["no ONNX"] = reason
        case "refused":
            found["refused by convert"] = reason
        case "crashed" if row.get("reached") == "run":
            found["does not run"] = reason
        case outcome if outcome not in RIGHT:
            found[outcome] = reason
    for step, why in row.get("faults", {}).items():
        kind, why = FAULTS[step.split()[0]], f"{step}: {why[:200]}"
        found[kind] = f"{found[kind]}; {why}" if kind in found else why
    return found


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _every(rows: list[Row]) -> str:
    return table(COLUMNS, [_line(r) for r in rows])


def _line(row: Row) -> list[str]:
    errors = ("convert_error", "prune_error", "onnx_error", "power")
    alone = f"{row['singles'] - row['singles_bad']}/{row['singles']}" if "singles" in row else ""
    return [
        row["model"].removeprefix("timm:").removeprefix("torchvision:"),
        row.get("input", ""),
        *(str(row.get(k, "")) for k in ("units", "removed")),
        alone,
        *(f"{row[k]:.0e}" if row.get(k) is not None else "" for k in errors),
        *(_step(row, kind) for kind in ("backward", "pickle", "save")),
        row.get("tp", ""),
        *(str(row.get(k, "")) for k in ("seconds", "onnx_seconds")),
        row["outcome"] + (f" ({_cell(row['note'])[:90]})" if "note" in row else ""),
    ]


def _step(row: Row, kind: str) -> str:
    """Return which nets failed in a step, or that none did."""
    failed = [k.partition(" ")[2] or "no" for k in row.get("faults", {}) if k.split()[0] == kind]
    return " ".join(failed) or ("yes" if row.get("reached") == "end" else "")
