"""Put the tables and plots of the measurements into README.md and docs/: ``python -m benchmarks.report``.

Nothing is measured here, and no prose is written: a page has pairs of marks, ``<!-- begin NAME -->`` and
``<!-- end -->``, and what stands between them is made anew from ``results.jsonl`` by the function of that name.
A verdict needs three seeds; a difference that is smaller than its spread (the 90 % interval of the mean of the
differences seed by seed, Student's t) is called that.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .page import table
from .run import rows

__all__ = ["PAGES", "fill"]

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{n}.md" for n in ("results", "method", "tried")))
# Two-sided 90 % quantiles of Student's t, by degrees of freedom.
T90 = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02}
OURS = "#c0392b"
Rows = list[dict[str, Any]]
COUNTS = {1: "one seed", 2: "two seeds"}


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


NAMES = {"dense": "dense", "train": "dense", "scratch": "a shallow net from scratch"}
NAMES |= dict.fromkeys(("torch-pruning", "filters"), "Torch-Pruning (filters)")
NAMES |= {"layout": "a published layout from scratch"}


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


def sizes(found: Rows) -> list[str]:
    return [share(found, "macs_share"), share(found, "params_share")]


def accuracy_lines(experiment: str, starts: Rows) -> list[list[str]]:
    """Return a line an arm: what it is, its costs, its accuracy by both protocols."""
    arms = by_arm(experiment)
    lines = []
    # The dense nets first, then by what was asked for.
    for arm, found in sorted(
        arms.items(), key=lambda a: (-a[1][0].get("target_macs", 2), len(a[1][0]["epochs"]))
    ):
        longer = [r for r in arms.get("dense", []) if sum(r["epochs"]) == sum(found[0]["epochs"])]
        judged = ["", ""]
        if arm not in ("dense", "start"):
            judged = [against(found, base) if base else "" for base in (starts, longer)]
        lines.append([words(found), *sizes(found), schedule(found), mean(found), *judged])
    return lines


ACCURACY = ["net", "MACs", "parameters", "epochs", "top-1 (%)"]
ACCURACY += ["to the dense net it started from", "to a dense net of as many epochs"]


def accuracy() -> str:
    """Compare nets trained to convergence, by both protocols."""
    starts = rows(experiment="resnet56-90", arm="dense")
    return table(ACCURACY, accuracy_lines("resnet56-further", starts))


def c7() -> str:
    """C7: the trainings of resnet110, each beside the dense net that it started from."""
    lines = accuracy_lines("resnet110-45", rows(experiment="resnet110-45", arm="start"))
    starts = rows(experiment="resnet110-45", arm="dense")
    lines += accuracy_lines("resnet110-further", starts)
    starts = rows(experiment="resnet110", arm="start")
    return table(ACCURACY, lines + accuracy_lines("resnet110", starts))


def schedules() -> str:
    """List all other trainings of resnet56, by experiment."""
    lines = []
    for experiment in ("resnet56-12", "resnet56-24", "resnet56-90", "resnet56-onward", "held-out"):
        arms = by_arm(experiment)
        for arm, found in arms.items():
            for epochs in dict.fromkeys(tuple(r["epochs"]) for r in found if arm != "start"):
                some = [r for r in found if tuple(r["epochs"]) == epochs]
                base = [r for r in arms.get("dense", []) if sum(r["epochs"]) == sum(epochs)]
                judged = f", judged by {some[0]['judged_by']}" if "judged_by" in some[0] else ""
                cells = [words(some) + judged, schedule(some), *sizes(some), mean(some)]
                lines.append([*cells, against(some, base) if arm != "dense" else ""])
    for row in rows(experiment="schedules"):
        where = f"{words([row])}, {row['note']}, `{row['commit']}`"
        cells = [where, schedule([row]), *sizes([row]), mean([row])]
        lines.append([*cells, f"seed {row['seed']}"])
    header = ["net", "epochs", *ACCURACY[1:3], "top-1 (%)", "to a dense net of as many epochs"]
    return table(header, lines)


LATENCIES = ("onnxruntime, batch 1", "torch, batch 1", "onnxruntime, batch 32")


def latency() -> str:
    """Compare costs at equal MACs: newest measurement of each net, share and arm, one thread."""
    lines = []
    shares = ("resnet56", 0.5), ("resnet56", 0.35), ("resnet56", 0.25), ("resnet110", 0.345)
    for net, target in shares:
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
            base, ours = arms["dense"], arms.get("resconv", [])
            cells = [net, base[0]["data"], schedule(base), str(len(base)), mean(base), mean(ours)]
            lines.append([*cells, against(ours, base)])
    header = ["net", "data", "epochs", "seeds", "plain (%)", "with ResConv (%)", "difference"]
    return table(header, lines)


def rankings() -> str:
    """C4: accuracy after a removal by each ranking."""
    lines = []
    for found in by_arm("rankings").values():
        if "ranking" in found[0]:
            after = [r | {"after": r.get("top1_after_removal", r["top1"])} for r in found]
            kept = "; ".join(" ".join(r["layout"]) for r in found)
            lines.append([found[0]["ranking"], mean(after, "after"), mean(found), kept])
    header = ["ranking", "top-1 right after the removal", "top-1 at the end"]
    return table([*header, "blocks kept, by seed"], lines)


def rates() -> str:
    """C6: accuracy right after the removal over the pruning rate, as a table and a plot."""
    arms = by_arm("rates")
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
    lines, points = [], []
    for arm, found in arms.items():
        if not arm.startswith("rate-"):
            continue
        change = max((r["top1"] - r["top1_before_removal"] for r in found), key=abs)
        cells = [f"{arm.removeprefix('rate-')} %", share(found, "macs_share"), mean(found)]
        lines.append([*cells, f"{change:+.2f}", against(found, arms["whole"])])
        gone = 100 * (1 - statistics.fmean(r["macs_share"] for r in found))
        points.append((gone, [r["top1"] for r in found]))
    points.sort()
    for rate, values in points:
        axes.plot([rate] * len(values), values, "o", color=OURS, markersize=4)
    axes.plot([r for r, _ in points], [statistics.fmean(v) for _, v in points], color=OURS)
    whole = statistics.fmean(r["top1"] for r in arms["whole"])
    axes.axhline(whole, color="#7f8c8d", linestyle="--", linewidth=1)
    axes.text(1, whole, "dense, same epochs", va="bottom", color="#7f8c8d")
    axes.set(xlabel="MACs removed (%)", ylabel="top-1 right after the removal (%)", xlim=(0, None))
    save(figure, axes, "rates")
    header = ["target", "MACs left", "top-1 right after (%)", "change by the removal", "to dense"]
    return table(header, lines) + "\n\n![Accuracy over the pruning rate](images/rates.svg)"


# What an arm of resnet56-further is called where it was timed.
TIMED = {
    "dense": "dense",
    "ours-macs-distilled-50": "resconv, distilled, MACs only",
    "ours-distilled-50": "resconv, distilled",
    "torch-pruning-distilled-50": "Torch-Pruning",
    "ours-distilled-35": "resconv, distilled, MACs only",
}


def timed() -> dict[str, tuple[Rows, dict[str, Any]]]:
    """Return the rows of each timed arm, and the last row of its costs."""
    arms = by_arm("resnet56-further")
    found = {}
    for arm, label in TIMED.items():
        target = arms[arm][0].get("target_macs", 0.5)
        where = {"net": "resnet56", "arm": label, "target_macs": target, "threads": 1}
        found[arm] = arms[arm], rows(experiment="latency", **where)[-1]
    return found


def tradeoff() -> str:
    """Plot accuracy against latency: ours beside filter pruning, both from the same dense net."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for arm in by_arm("resnet56-further"):
        found, cost = timed()[arm]
        at = cost["latency"][LATENCIES[0]]
        color = OURS if found[0]["method"] in ("resconv", "compress") else "#2c3e50"
        axes.plot([at] * len(found), [r["top1"] for r in found], "o", color=color, markersize=4)
        label = words(found).replace(" of the MACs", "")
        where = {"xytext": (6, -3), "textcoords": "offset points", "fontsize": 7, "color": color}
        axes.annotate(label, (at, statistics.fmean(r["top1"] for r in found)), **where)
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
        found = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        last = {r.get("job", r["model"]): r["outcome"] for r in found}
        counts = Counter(last.values()).most_common()
        lines.append([where, str(len(last)), ", ".join(f"{n} {outcome}" for outcome, n in counts)])
    return table(["nets of", "nets", "outcome"], lines)


def reach() -> str:
    """Say what can go of nets, by layers and blocks alone and by every kind of unit."""
    lines = []
    newest = {r["net"]: r for r in rows(experiment="reach")}
    has_times = all("latency after" in r for r in newest.values())
    for r in newest.values():
        kinds = sorted(r["kinds after"].items(), key=lambda k: -k[1])
        lines.append(
            [
                f"{r['net']}, {r['side']} px",
                f"{r['units before']} to {r['units after']}",
                f"{r['left before']:.1%}",
                f"{r['left after']:.1%}",
                *(f"{r[k]:.1%}" for k in ("latency before", "latency after") if has_times),
                ", ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in kinds),
            ]
        )
    made = rows(experiment="reach")[-1]
    header = ["net", "units", "MACs left: layers, blocks", "MACs left: all kinds"]
    header += ["latency left: layers, blocks", "latency left: all kinds"] if has_times else []
    header.append("kinds")
    return (
        f"{table(header, lines)}\n\n`{made['command']}`, {made['date']}, commit {made['commit']}."
    )


def headline() -> str:
    """Return the README's one table."""
    lines = []
    for arm, (found, cost) in timed().items():
        if arm != "ours-distilled-50":
            cells = [words(found), share(found, "macs_share"), mean(found), str(len(found))]
            ratios = cost["latency"][LATENCIES[0]], cost["peak_memory"]
            lines.append([*cells, *(f"{r:.2f}x" for r in ratios)])
    return table(["ResNet-56", "MACs", "top-1 (%)", "seeds", "latency", "peak memory"], lines)


MADE = (
    accuracy,
    c7,
    schedules,
    latency,
    with_resconv,
    rankings,
    rates,
    tradeoff,
    coverage,
    reach,
    headline,
)
TABLES: dict[str, Callable[[], str]] = {f.__name__.replace("_", "-"): f for f in MADE}
COSTS = "fused by-hand training-step throughput surgery-time gpu-latency whole-run followed"
TABLES |= {name: costs_of(name) for name in COSTS.split()}


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
