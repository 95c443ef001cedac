"""docs/coverage.md from the rows of the sweep: the rates, what failed and why, every model."""

from collections import Counter

from .page import stamp, table, write_section
from .zoo import TORCH_PRUNING, torch_pruning_names

__all__ = ["write"]

OUTCOMES = ("complete", "pruned", "no ONNX from torch", "unstable", "refused", "wrong", "crashed")
PAGE = "coverage.md"
COLUMNS = ("model", "input", "units", "removed", "convert", "prune", "ONNX error", "power")
COLUMNS += ("surgery", "ONNX", "outcome")


def _size(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"


def _zoo(row: dict) -> str:
    return row["model"].partition(":")[0]


def _summary(title: str, rows: list[dict], labels: list[str]) -> list[str]:
    mine = [r for r in rows if r["job"] in labels]
    counts = Counter(r["outcome"] for r in mine)
    pruned = sum(counts[k] for k in ("complete", "pruned", "no ONNX from torch"))
    tried = pruned - counts["pruned"]
    return [
        title,
        str(len(labels)),
        str(len(labels) - len(mine)),
        *(str(counts[k]) for k in OUTCOMES),
        f"{pruned} of {len(mine)} ({100 * pruned / max(1, len(mine)):.1f} %)",
        f"{counts['complete']} of {tried} ({100 * counts['complete'] / max(1, tried):.1f} %)",
    ]


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
            ["", "models", "not run yet", *OUTCOMES, "all pruned", "right in ONNX Runtime"], lines
        )
        + "\n\n`complete`: converted, pruned, written as ONNX and run by ONNX Runtime, each step "
        "within 1e-4 (relative, float32) of what went in. `pruned`: the file was not tried yet. "
        "`no ONNX from torch`: pruned within it, and torch's exporter cannot write the dense net "
        "either. `unstable`: past 1e-4 in float32, within 1e-10 in float64. "
        "`refused`: an error that names the reason, nothing written. Torch-Pruning prunes "
        f"{len(TORCH_PRUNING[True])} of the {listed} models of its list by its own page "
        "(benchmarks/prunability/readme.md), which checks that the pruned net runs, not what it "
        "computes.\n\n"
        f"Largest errors: convert {_size(worst['convert_error'])}, prune "
        f"{_size(worst['prune_error'])}, ONNX {_size(worst['onnx_error'])}. {moving}",
        page=PAGE,
    )
    failing = [r for r in rows if r["outcome"] not in ("complete", "pruned")]
    write_section(
        "Not complete",
        table(
            ["model", "outcome", "reason"],
            [[r["model"], r["outcome"], _cell(r.get("reason", ""))] for r in failing],
        ),
        page=PAGE,
    )
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
    numbers = ("units", "removed")
    errors = ("convert_error", "prune_error", "onnx_error", "power")
    return [
        row["model"].partition(":")[2],
        row.get("input", ""),
        *(str(row.get(k, "")) for k in numbers),
        *(_size(row.get(k)) for k in errors),
        *(str(row.get(k, "")) for k in ("seconds", "onnx_seconds")),
        row["outcome"] + (f" ({row['note']})" if "note" in row else ""),
    ]
