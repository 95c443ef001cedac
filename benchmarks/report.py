"""Put the tables and plots of the measurements into README.md and docs/: ``python -m benchmarks.report``.

Nothing is measured here, and no prose is written: a page has pairs of marks, ``<!-- begin NAME -->`` and
``<!-- end -->``, and what stands between them is made anew from ``results.jsonl`` by the function of that name.
A verdict needs three seeds; a difference that is smaller than its spread (the 90 % interval of the mean of the
differences seed by seed, Student's t) is called that.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .run import rows

__all__ = ["PAGES", "fill"]

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "tried.md")
# Two-sided 90 % quantiles of Student's t, by degrees of freedom.
T90 = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02}
Rows = list[dict[str, Any]]
COUNTS = {1: "one seed", 2: "two seeds"}


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    every = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def mean(found: Rows, key: str = "top1") -> str:
    """Return mean and standard deviation over the seeds, or the one value."""
    values = [r[key] for r in found]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def share(found: Rows, key: str) -> str:
    return f"{statistics.fmean(r[key] for r in found):.1%}" if found else ""


def against(found: Rows, base: Rows) -> str:
    """Return the mean difference in points, seed by seed where both have it, and a verdict from three on."""
    by_seed = {r["seed"]: r["top1"] for r in base}
    one = next(iter(by_seed.values())) if len(by_seed) == 1 else None
    points = [r["top1"] - by_seed.get(r["seed"], one) for r in found if r["seed"] in by_seed or one]
    if not points:
        return ""
    average = statistics.fmean(points)
    if len(points) < 3:
        return f"{average:+.2f} ({COUNTS[len(points)]})"
    half = T90[min(len(points) - 1, 5)] * statistics.stdev(points) / len(points) ** 0.5
    verdict = "within the spread" if abs(average) <= half else "better" if average > 0 else "worse"
    return f"{average:+.2f} ± {half:.2f} ({verdict})"


def schedule(found: Rows) -> str:
    return " + ".join(map(str, found[0]["epochs"]))


NAMES = {
    "dense": "dense",
    "torch-pruning": "Torch-Pruning (filters)",
    "filters": "Torch-Pruning (filters)",
    "scratch": "a shallow net from scratch",
    "layout": "a published layout from scratch",
    "train": "dense",
}


def words(found: Rows) -> str:
    """Return what an arm is called in the tables."""
    first = found[0]
    parts = [NAMES.get(first["method"], "resconv")]
    if first.get("from_random"):
        parts.append("from random weights")
    if first.get("distill"):
        parts.append("distilled with hints" if first.get("hints") else "distilled")
    if target := first.get("target_macs"):
        limited = " and parameters" if first.get("target_params") else ""
        parts.append(f"{100 * target:g} % of the MACs{limited}")
    return ", ".join(parts)


def by_arm(experiment: str, **wanted: Any) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows(experiment=experiment, **wanted):
        found.setdefault(row["arm"], []).append(row)
    return found


def accuracy_lines(experiment: str, starts: Rows) -> list[list[str]]:
    """Return a line an arm: what it is, its costs, its accuracy by both protocols."""
    arms = by_arm(experiment)
    lines = []
    # The dense nets first, then by what was asked for.
    for arm, found in sorted(
        arms.items(), key=lambda a: (-a[1][0].get("target_macs", 2), len(a[1][0]["epochs"]))
    ):
        longer = [r for r in arms.get("dense", []) if sum(r["epochs"]) == sum(found[0]["epochs"])]
        pruned = arm not in ("dense", "start")
        lines.append(
            [
                words(found),
                share(found, "macs_share"),
                share(found, "params_share"),
                schedule(found),
                mean(found),
                against(found, starts) if pruned and starts else "",
                against(found, longer) if pruned and longer else "",
            ]
        )
    return lines


ACCURACY = [
    "net",
    "MACs",
    "parameters",
    "epochs",
    "top-1 (%)",
    "to the dense net it started from",
    "to a dense net of as many epochs",
]


def accuracy() -> str:
    """Compare nets trained to convergence, by both protocols."""
    return table(
        ACCURACY, accuracy_lines("resnet56-further", rows(experiment="resnet56-90", arm="dense"))
    )


def c7() -> str:
    starts = rows(experiment="resnet110-45", arm="dense")
    lines = accuracy_lines("resnet110-45", rows(experiment="resnet110-45", arm="start"))
    lines += accuracy_lines("resnet110-further", starts)
    return table(
        ACCURACY, lines + accuracy_lines("resnet110", rows(experiment="resnet110", arm="start"))
    )


def schedules() -> str:
    """List all other trainings of resnet56, by experiment."""
    lines = []
    for experiment in ("resnet56-12", "resnet56-24", "resnet56-90", "resnet56-onward", "held-out"):
        arms = by_arm(experiment)
        for arm, found in arms.items():
            for epochs in dict.fromkeys(tuple(r["epochs"]) for r in found):
                some = [r for r in found if tuple(r["epochs"]) == epochs]
                if arm == "start":
                    continue
                base = [r for r in arms.get("dense", []) if sum(r["epochs"]) == sum(epochs)]
                judged = f", judged by {some[0]['judged_by']}" if "judged_by" in some[0] else ""
                lines.append(
                    [
                        words(some) + judged,
                        " + ".join(map(str, epochs)),
                        share(some, "macs_share"),
                        share(some, "params_share"),
                        mean(some),
                        against(some, base) if arm != "dense" else "",
                    ]
                )
    for row in rows(experiment="schedules"):
        where = [words([row]), row["note"], f"`{row['commit']}`"]
        lines.append(
            [
                ", ".join(where),
                schedule([row]),
                share([row], "macs_share"),
                share([row], "params_share"),
                mean([row]),
                f"seed {row['seed']}",
            ]
        )
    return table(
        ["net", "epochs", "MACs", "parameters", "top-1 (%)", "to a dense net of as many epochs"],
        lines,
    )


LATENCIES = ("onnxruntime, batch 1", "torch, batch 1", "onnxruntime, batch 32")


def latency() -> str:
    """Compare costs at equal MACs: newest measurement of each net, share and arm, one thread."""
    lines = []
    for net, target in (
        ("resnet56", 0.5),
        ("resnet56", 0.35),
        ("resnet56", 0.25),
        ("resnet110", 0.345),
    ):
        for row in rows(experiment="latency", net=net, target_macs=target, threads=1):
            if row["arm"] in ("dense", "single weights"):
                continue
            ratios = [f"{row['latency'][k]:.2f}x" if k in row["latency"] else "" for k in LATENCIES]
            cells = [net, f"{100 * target:g} %", row["arm"], f"{row['macs_share']:.1%}", *ratios]
            lines.append([*cells, f"{row['peak_memory']:.2f}x"])
    return table(["net", "target", "arm", "MACs", *LATENCIES, "peak memory"], lines)


def with_resconv() -> str:
    """C1, C2: the same net trained with ResConv and without it."""
    lines = []
    for experiment in ("with-resconv", "with-resconv-3", "with-resconv-digits"):
        for net in dict.fromkeys(r["net"] for r in rows(experiment=experiment)):
            arms = by_arm(experiment, net=net)
            plain, ours = arms["dense"], arms.get("resconv", [])
            lines.append(
                [
                    net,
                    plain[0]["data"],
                    schedule(plain),
                    str(len(plain)),
                    mean(plain),
                    mean(ours),
                    against(ours, plain),
                ]
            )
    return table(
        ["net", "data", "epochs", "seeds", "plain (%)", "with ResConv (%)", "difference"], lines
    )


def rankings() -> str:
    lines = [
        [
            found[0]["ranking"],
            mean([r | {"before": r.get("top1_after_removal", r["top1"])} for r in found], "before"),
            mean(found),
            "; ".join(" ".join(r["layout"]) for r in found),
        ]
        for found in by_arm("rankings").values()
        if "ranking" in found[0]
    ]
    return table(
        ["ranking", "top-1 right after the removal", "top-1 at the end", "blocks kept, by seed"],
        lines,
    )


def rates() -> str:
    """C6: accuracy right after the removal over the pruning rate, as a table and a plot."""
    arms = by_arm("rates")
    lines, points = [], []
    for arm, found in arms.items():
        if not arm.startswith("rate-"):
            continue
        changes = [r["top1"] - r["top1_before_removal"] for r in found]
        change = max(changes, key=abs)
        lines.append(
            [
                arm.removeprefix("rate-") + " %",
                share(found, "macs_share"),
                mean(found),
                f"{change:+.2f}",
                against(found, arms["whole"]),
            ]
        )
        gone = 100 * (1 - statistics.fmean(r["macs_share"] for r in found))
        points.append((gone, [r["top1"] for r in found]))
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
    points.sort()
    for rate, values in points:
        axes.plot([rate] * len(values), values, "o", color="#c0392b", markersize=4)
    axes.plot([r for r, _ in points], [statistics.fmean(v) for _, v in points], color="#c0392b")
    whole = statistics.fmean(r["top1"] for r in arms["whole"])
    axes.axhline(whole, color="#7f8c8d", linestyle="--", linewidth=1)
    axes.text(1, whole, "dense, same epochs", va="bottom", color="#7f8c8d")
    axes.set(xlabel="MACs removed (%)", ylabel="top-1 right after the removal (%)", xlim=(0, None))
    save(figure, axes, "rates")
    header = ["target", "MACs left", "top-1 right after (%)", "change by the removal", "to dense"]
    return table(header, lines) + "\n\n![Accuracy over the pruning rate](images/rates.svg)"


def tradeoff() -> str:
    """Plot accuracy against latency: ours beside filter pruning, both from the same dense net."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    timed = {
        "ours-macs-distilled-50": "resconv, distilled, MACs only",
        "ours-distilled-50": "resconv, distilled",
        "ours-distilled-35": "resconv, distilled, MACs only",
        "torch-pruning-distilled-50": "Torch-Pruning",
        "dense": "dense",
    }
    for arm, found in by_arm("resnet56-further").items():
        target = found[0].get("target_macs", 0.5)
        costs = rows(
            experiment="latency", net="resnet56", target_macs=target, threads=1, arm=timed.get(arm)
        )
        if not costs:
            continue
        at = costs[-1]["latency"][LATENCIES[0]]
        ours = found[0]["method"] in ("resconv", "compress")
        color = "#c0392b" if ours else "#2c3e50"
        axes.plot([at] * len(found), [r["top1"] for r in found], "o", color=color, markersize=4)
        axes.annotate(
            words(found).replace(" of the MACs", ""),
            (at, statistics.fmean(r["top1"] for r in found)),
            xytext=(6, -3),
            textcoords="offset points",
            fontsize=7,
            color=color,
        )
    axes.set(
        xlabel="latency, share of the dense net's (ONNX Runtime, batch 1, 1 thread)",
        ylabel="top-1 (%)",
        xlim=(0.25, 1.25),
    )
    save(figure, axes, "tradeoff")
    return "![Accuracy against latency](images/tradeoff.svg)"


def save(figure: Any, axes: Any, name: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    matplotlib.rcParams["svg.hashsalt"] = name  # the same file every time
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def plain(value: Any) -> str:
    """Return a cell: whole numbers without a point, in groups of three digits."""
    return f"{int(value):,}" if isinstance(value, float) and value.is_integer() else str(value)


def costs_of(experiment: str) -> Callable[[], str]:
    def write() -> str:
        found = rows(experiment=experiment)
        about = {"experiment", "date", "machine", "command", "commit"}
        keys = [k for k in found[0] if k not in about]
        lines = [[plain(r.get(k, "")) for k in keys] for r in found]
        made = found[-1]
        when = f"{made['date']}, commit {made['commit']}, {made['machine']}"
        return f"{table(keys, lines)}\n\n`{made['command']}`, {when}."

    return write


def coverage() -> str:
    """Count what the sweeps over the zoos found."""
    lines = []
    for name, where in (("coverage", "timm, torchvision"), ("coverage_others", "other packages")):
        log = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
        if not log.is_file():
            continue
        last = {
            r.get("job", r["model"]): r["outcome"]
            for r in map(json.loads, log.read_text(encoding="utf-8").splitlines())
        }
        counts: dict[str, int] = {}
        for outcome in last.values():
            counts[outcome] = counts.get(outcome, 0) + 1
        counted = ", ".join(
            f"{n} {outcome}" for outcome, n in sorted(counts.items(), key=lambda p: -p[1])
        )
        lines.append([where, str(len(last)), counted])
    return table(["nets of", "nets", "outcome"], lines)


def headline() -> str:
    """Return the README's one table."""
    lines = []
    arms = by_arm("resnet56-further")
    timed = {
        "dense": ("dense", 0.5),
        "ours-macs-distilled-50": ("resconv, distilled, MACs only", 0.5),
        "torch-pruning-distilled-50": ("Torch-Pruning", 0.5),
        "ours-distilled-35": ("resconv, distilled, MACs only", 0.35),
    }
    for arm, (label, target) in timed.items():
        found = arms[arm]
        cost = rows(experiment="latency", net="resnet56", arm=label, target_macs=target, threads=1)[
            -1
        ]
        lines.append(
            [
                words(found),
                share(found, "macs_share"),
                mean(found),
                str(len(found)),
                f"{cost['latency'][LATENCIES[0]]:.2f}x",
                f"{cost['peak_memory']:.2f}x",
            ]
        )
    return table(["ResNet-56", "MACs", "top-1 (%)", "seeds", "latency", "peak memory"], lines)


TABLES: dict[str, Callable[[], str]] = {
    f.__name__.replace("_", "-"): f
    for f in (accuracy, c7, schedules, latency, with_resconv, rankings, rates, tradeoff, coverage)
}
TABLES["headline"] = headline
for _name in (
    "fused",
    "by-hand",
    "training-step",
    "throughput",
    "surgery-time",
    "gpu-latency",
    "reach",
):
    TABLES[_name] = costs_of(_name)
TABLES["whole-run"], TABLES["followed"] = costs_of("whole-run"), costs_of("followed")


def fill(page: Path) -> None:
    """Make what stands between the marks of a page anew."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"<!-- begin ([\w-]+) -->\n.*?<!-- end -->", re.S)
    made = pattern.sub(lambda m: f"<!-- begin {m[1]} -->\n{TABLES[m[1]]()}\n<!-- end -->", text)
    page.write_text(made, encoding="utf-8")


def main() -> None:
    for page in PAGES:
        fill(page)


if __name__ == "__main__":
    main()
