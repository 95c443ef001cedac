"""docs/coverage.md from the rows of the sweep: the rates, what failed and why, every model."""

from collections import Counter

from .page import stamp, table, write_section
from .zoo import TORCH_PRUNING, torch_pruning_names

__all__ = ["write", "write_others"]

OUTCOMES = ("complete", "pruned", "no ONNX from torch", "unstable", "refused", "wrong", "crashed")
PAGE = "coverage.md"
COLUMNS = ("model", "input", "units", "removed", "alone", "convert", "prune", "ONNX error", "power")
COLUMNS += ("backward", "pickle", "save", "Torch-Pruning", "surgery", "ONNX", "outcome")
SURGERY_RIGHT = ("complete", "pruned", "no ONNX from torch")


def _size(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"


def _zoo(row: dict) -> str:
    return row["model"].partition(":")[0]


def _summary(title: str, rows: list[dict], labels: list[str]) -> list[str]:
    mine = [r for r in rows if r["job"] in labels]
    counts = Counter(r["outcome"] for r in mine)
    pruned = sum(counts[k] for k in SURGERY_RIGHT)
    tried = pruned - counts["pruned"]
    return [
        title,
        str(len(labels)),
        str(len(labels) - len(mine)),
        *(str(counts[k]) for k in OUTCOMES),
        str(sum(bool(r.get("faults")) for r in mine)),
        f"{pruned} of {len(mine)} ({100 * pruned / max(1, len(mine)):.1f} %)",
        f"{counts['complete']} of {tried} ({100 * counts['complete'] / max(1, tried):.1f} %)",
    ]


def write_others(rows: list[dict], labels: list[str]) -> None:
    """Write what became of the nets of other packages; ``labels`` are all that there are."""
    rows = sorted((r for r in rows if r["job"] in labels), key=lambda r: r["job"].lower())
    kinds = Counter(kind for r in rows for kind in _kinds(r))
    theirs = Counter(r.get("tp", "not run") for r in rows)
    done = sum(not _kinds(r) for r in rows)
    commits = Counter(r["commit"] for r in rows)
    lines = [
        ["done: all steps right", str(done)],
        *([name, str(kinds[name])] for name in (*KINDS, *sorted(set(kinds) - set(KINDS)))),
        *([f"Torch-Pruning 1.6.1: {name}", str(n)] for name, n in theirs.most_common()),
    ]
    write_section(
        "Other packages",
        f"{stamp(command='python -m benchmarks.coverage others')} "
        + "; ".join(f"{n} nets at commit {c}" for c, n in commits.most_common())
        + f". {len(rows)} of {len(labels)} nets, of {len({r['job'].split(':')[0] for r in rows})} "
        "packages; a net can be in several lines.\n\n"
        + table(["", f"nets of {len(rows)}"], lines)
        + "\n\n`refused by convert`: no unit, with the reason, before any training. `refused by "
        "prune`: a unit that convert gave a gate cannot be removed, in half of the units, all or one "
        "alone. `does not run`, `wrong`: the pruned net. `not trained`: a training pass of the gated, "
        "open or pruned net fails where the dense net's does not. `not loaded`: pickle in a new "
        "process, or resconv.load. Torch-Pruning removes half of the channels by magnitude; `runs` "
        "says that the result runs, not what it computes.",
        page=PAGE,
    )
    write_section("Other packages: not done", _reasons(rows), page=PAGE)
    write_section(
        "Other packages: every net",
        "A random half of the units removed; `alone`: units that were removed one by one, of those "
        "tried; backward, pickle: the nets that fail.\n\n"
        + table(list(COLUMNS), [_line(r) for r in rows]),
        page=PAGE,
    )


KINDS = (
    "refused by convert", "refused by prune", "does not run", "wrong", "not trained", "not loaded",
    "unstable", "no ONNX", "crashed",
)  # fmt: skip
FAULTS = {"prune": "refused by prune", "run": "does not run", "wrong": "wrong"}
FAULTS |= {"backward": "not trained", "pickle": "not loaded", "save": "not loaded"}


def _reasons(rows: list[dict]) -> str:
    found = [[r["model"], kind, _cell(why)] for r in rows for kind, why in _kinds(r).items()]
    return table(["net", "what", "reason"], found)


def _kinds(row: dict) -> dict[str, str]:
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
        case outcome if outcome not in SURGERY_RIGHT:
            found[outcome] = reason
    for step, why in row.get("faults", {}).items():
        kind, why = FAULTS[step.split()[0]], f"{step}: {why[:200]}"
        found[kind] = f"{found[kind]}; {why}" if kind in found else why
    return found


def write(rows: list[dict], labels: list[str]) -> None:
    """Write the page from the rows; ``labels`` are all that the sweep will have run."""
    rows = sorted((r for r in rows if r["job"] in labels), key=lambda r: r["job"])
    zoos = {zoo: [r for r in rows if _zoo(r) == zoo] for zoo in ("torchvision", "timm")}
    listed = len(torch_pruning_names())
    lines = [
        _summary(
            "torchvision, every model", rows, [n for n in labels if n.startswith("torchvision:")]
        ),
        _summary("timm, one a family", rows, [n for n in labels if n.startswith("timm:")]),
        _summary("the list Torch-Pruning publishes", rows, torch_pruning_names()),
    ]
    worst = {
        key: max((r[key] for r in rows if key in r), default=0.0)
        for key in ("convert_error", "prune_error", "onnx_error")
    }
    power = sorted(r["power"] for r in rows if "power" in r)
    moving = (
        f"Of the models, {sum(p > 1e-3 for p in power)} of {len(power)} move by more than 1e-3 when "
        "any one of six units' scales is 0.5 off (`power`), so a forgotten factor shows."
    )
    groups = Counter((r["commit"], *r["variances"]) for r in rows)
    commits = "; ".join(
        f"{n} models at commit {commit} (BatchNorm variances moved by factors in [{a:g}, {b:g}])"
        for (commit, a, b), n in sorted(groups.items(), key=lambda g: -g[1])
    )
    write_section(
        "Rates",
        f"{stamp(command='python -m benchmarks.coverage')} {commits}.\n\n"
        + table(
            [
                "",
                "models",
                "not run yet",
                *OUTCOMES,
                "other faults",
                "all pruned",
                "right in ONNX Runtime",
            ],
            lines,
        )
        + "\n\n`complete`: converted, pruned, written as ONNX and run by ONNX Runtime, each step "
        "within 1e-4 (relative, float32) of what went in. `pruned`: the file was not tried yet. "
        "`no ONNX from torch`: pruned within it, and torch's exporter cannot write the dense net "
        "either. `unstable`: past 1e-4 in float32, within 1e-10 in float64. "
        "`refused`: an error that names the reason, nothing written. `other faults`: of the training "
        "pass, pickle, save and units alone, listed below; rows of older commits did not try these. "
        "Torch-Pruning prunes "
        f"{len(TORCH_PRUNING[True])} of the {listed} models of its list by its own page "
        "(benchmarks/prunability/readme.md), which checks that the pruned net runs, not what it "
        "computes.\n\n"
        f"Largest errors: convert {_size(worst['convert_error'])}, prune "
        f"{_size(worst['prune_error'])}, ONNX {_size(worst['onnx_error'])}. {moving}",
        page=PAGE,
    )
    write_section("Not complete", _reasons(rows), page=PAGE)
    about = {
        "torchvision": "Detectors run up to their boxes: maps and heads, no selection "
        "(benchmarks/zoo.py says why). ",
        "timm": "The smallest variant of each family that has something to remove; a family is a "
        "module of timm and the first word of a name, and has a convolution that overlaps. ",
    }
    for zoo, mine in zoos.items():
        write_section(
            zoo,
            about[zoo]
            + "A random half of the units removed; errors are relative to the largest output. "
            "`surgery` is convert and prune, `ONNX` the export with its checks, in seconds.\n\n"
            + table(
                list(COLUMNS),
                [_line(r) for r in mine],
            ),
            page=PAGE,
        )


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _line(row: dict) -> list[str]:
    errors = ("convert_error", "prune_error", "onnx_error", "power")
    alone = f"{row['singles'] - row['singles_bad']}/{row['singles']}" if "singles" in row else ""
    return [
        row["model"].removeprefix("timm:").removeprefix("torchvision:"),
        row.get("input", ""),
        *(str(row.get(k, "")) for k in ("units", "removed")),
        alone,
        *(_size(row.get(k)) for k in errors),
        *(_step(row, kind) for kind in ("backward", "pickle", "save")),
        row.get("tp", ""),
        *(str(row.get(k, "")) for k in ("seconds", "onnx_seconds")),
        row["outcome"] + (f" ({_cell(row['note'])[:90]})" if "note" in row else ""),
    ]


def _step(row: dict, kind: str) -> str:
    """Return which nets failed in a step, or that none did."""
    failed = [k.partition(" ")[2] or "no" for k in row.get("faults", {}) if k.split()[0] == kind]
    return " ".join(failed) or ("yes" if row.get("reached") == "end" else "")
