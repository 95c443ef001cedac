"""Write the tables and plots of the paper's claims into docs/results.md, from benchmarks/results/.

Nothing is measured here: ``python -m benchmarks.accuracy SUITE`` fills in what is missing. A row
without a result names the command that makes it.
"""

import io
import json
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from resconv.files import write_text

from .arms import (
    CIFAR,
    COMPARED,
    NAMES,
    OURS,
    RANKINGS,
    RESULTS,
    SUITES,
    Job,
    Rows,
    arm_named,
    arm_of,
    epochs_in,
    epochs_of,
    gains,
    read_results,
    rows_of,
    start_of,
    top1_with_and_without,
)
from .goals import goals
from .latency import GOAL, by_arm, read_records, share_of_dense
from .misses import TITLE as MISSES
from .misses import misses
from .page import DOCS, anchor, table, write_section

MISSING = "not run"


def commands(suite: str, rows: Iterable[dict[str, Any]]) -> str:
    """Say which command, when and on what machine."""
    rows = list(rows)
    dates = sorted({r["date"] for r in rows})
    machines = sorted({r["machine"] for r in rows})
    seeds = sorted({r["seed"] for r in rows})
    named = ", ".join(map(str, seeds))
    return (
        f"`python -m benchmarks.accuracy {suite}`, then `python -m benchmarks.claims`; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, seed{'s' * (len(seeds) > 1)} {named}, "
        f"{'; '.join(machines)}."
    )


def spread(values: list[float]) -> str:
    """Return mean and standard deviation, or the one value."""
    if not values:
        return MISSING
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def done(jobs: list[Job], results: Rows) -> list[dict[str, Any]]:
    return [results[job.name] for job in jobs if job.name in results]


def with_resconv(results: Rows) -> None:
    """C1 and C2: the same net with ResConv and without it, nothing pruned."""
    for suite in ("plain", "digits"):
        jobs = SUITES[suite]
        if not done(jobs, results):
            continue
        lines = []
        for net in dict.fromkeys(job.net for job in jobs):
            plain, ours = top1_with_and_without(suite, net, results)
            points = gains(suite, "resconv", "dense", results, net)
            lines.append(
                [
                    net,
                    str(jobs[0].epochs),
                    str(len(points)),
                    spread(plain),
                    spread(ours),
                    f"{statistics.fmean(points):+.2f}" if points else "",
                ]
            )
        where = done(jobs, results)[0]["data"]
        write_section(
            f"C1, C2: training with ResConv, {where}",
            f"{commands(suite, done(jobs, results))} Top-1 in %; the ResConv column is the fused net "
            "(an ordinary net of the same size). Every conv layer that keeps its input's shape is "
            'a ResConv from the start (`start="identity"`), without pressure on the scales.\n\n'
            + table(["net", "epochs", "seeds", "plain", "ResConv", "points"], lines),
        )


METHODS = {
    "dense": "dense",
    "once": "resconv, one run",
    "ours": "resconv, from the dense net",
    "finetuned": "resconv, from the dense net, finetuned",
    "torch-pruning": "Torch-Pruning (filters)",
    "scratch": "resconv's net from scratch",
}


def words_for(job: Job) -> str:
    """Return what an arm is called in the tables."""
    parts = [METHODS[job.kind], *job.marks]
    if job.macs is not None:
        parts.append(f"{100 * job.macs:g} %")
    return ", ".join(parts)


def schedule_of(job: Job) -> str:
    """Return an arm's epochs, those of its start apart: "4 + 8"."""
    before = epochs_of(job) - job.epochs
    return f"{before} + {job.epochs}" if before and job.epochs else str(before + job.epochs)


def compare(suite: str, results: Rows) -> None:
    """C6, C7 and the comparison with other methods at equal MACs and epochs."""
    jobs = SUITES[suite]
    found = done(jobs, results)
    if not found:
        return
    start = start_of(suite)
    total = epochs_of(arm_of(suite, "dense"))
    pruned = next(j for j in jobs if j.kind in OURS)
    starts = rows_of(suite, "start", results)
    lines = []
    for job in {j.arm: j for j in jobs}.values():
        rows = list(rows_of(suite, job.arm, results).values())
        if not rows:
            lines.append([words_for(job), "", "", "", "", MISSING, "", ""])
            continue
        alike = job.arm != "dense" and epochs_of(job) == total
        points = gains(suite, job.arm, "dense", results) if alike else []
        lines.append(
            [
                words_for(job),
                share_of(rows, starts, "macs_after"),
                share_of(rows, starts, "num_params_after"),
                schedule_of(job),
                str(len(rows)),
                spread([r["top1"] for r in rows]),
                f"{statistics.fmean(points):+.2f}" if points else "",
                "; ".join(", ".join(r["layout"]) for r in rows if "layout" in r),
            ]
        )
    ours = [r for r in found if r["kind"] in ("ours", "once")]
    exact = [
        f"{r['name'].rpartition('/')[2]}: {r['top1'] - r['top1_training_form']:+.2f} points by removal, "
        f"{len(r['removed_with_nonzero_scale'])} removed units with a scale other than 0"
        for r in ours
    ]
    write_section(
        f"{start.net} on {found[0]['data']}, {epochs_in(suite)} epochs: accuracy at equal MACs",
        f"{commands(suite, found)} {conditions(jobs, start, pruned)}\n\n"
        + table(
            [
                "arm",
                "MACs",
                "parameters",
                "epochs",
                "seeds",
                "top-1",
                "points to dense",
                "blocks kept",
            ],
            lines,
        )
        + ("\n\nPruning without retraining: " + "; ".join(exact) + "." if exact else ""),
    )


def conditions(jobs: list[Job], start: Job, pruned: Job) -> str:
    """Say how the arms of a suite were trained; ``pruned`` is one of ours."""
    kinds = {j.kind for j in jobs}
    # Where a suite trains no dense net of its own, all seeds go on from the same one.
    which = "the dense net of their seed," if start.epochs else "one dense net, whatever the seed,"
    sentences = [
        f"Top-1 in %. Every arm is trained for {epochs_of(pruned)} epochs in all.",
        f"Pruned nets start from {which} of {epochs_of(start)} epochs, and go on for the rest in batches of "
        f"{pruned.batch_size} at a peak rate of {pruned.lr}.",
    ]
    if "finetuned" in kinds:
        sentences.append(
            "Resconv's nets were pruned by the arms of the same name that went on at a low rate "
            '("finetuned": their epochs are counted in), and are trained after the removal, as '
            "Torch-Pruning's are."
        )
    else:
        sentences.append("No resconv net is retrained after pruning.")
    if "once" in kinds:
        sentences.append(
            '"One run" is sparse training from random weights, with no dense net before it.'
        )
    if "torch-pruning" in kinds:
        sentences.append(
            "Torch-Pruning: DepGraph, GroupNormPruner with group magnitude, pruned in one step and "
            "finetuned; only inner channels of blocks, since it cannot follow channels through "
            "zero-padded shortcuts."
        )
    if "scratch" in kinds:
        sentences.append(
            "The net from scratch is resconv's from the dense net, held to parameters, trained by itself "
            "from random weights."
        )
    sentences.append(
        'resconv is held to the same share of MACs and of parameters; "MACs only" is not held to parameters.'
    )
    if any(j.distill for j in jobs):
        sentences.append(
            '"Distilled": half of the loss is to follow that dense net (`resconv compress --distill`).'
        )
    if any(j.hints for j in jobs):
        sentences.append(
            '"With hints": what its layers between units read is followed as well (`--hints`).'
        )
    sentences.append(
        "Points to dense: the mean over the seeds that both have, each against the dense net of its seed. "
        "The last column is blocks kept a stage (+ blocks with one of two convs), for each seed."
    )
    return " ".join(sentences)


def choices(results: Rows) -> None:
    """Show what was tried without the test images."""
    jobs = SUITES["held-out"]
    found = done(jobs, results)
    if not found:
        return
    names = {
        "start": "dense",
        "start-resconv": "dense, trained with ResConv and fused",
        "dense": "dense",
        "dense-resconv": "dense, trained with ResConv and fused",
        "late-50": "blocks mostly of the last stage, from scratch",
        "even-50": "blocks of all stages alike, from scratch",
        "early-50": "blocks mostly of the first stage, from scratch",
    }
    dense = rows_of("resnet56", "dense", results)
    lines = []
    for job in jobs:
        cells = [MISSING, "", "", ""]
        if row := results.get(job.name):
            cells = [
                spread([row["top1"]]),
                share_of([row], dense, "macs_after"),
                share_of([row], dense, "num_params_after"),
                ", ".join(row.get("layout", [])),
            ]
        lines.append([names[job.arm], str(job.epochs), *cells])
    write_section(
        f"Choices: {jobs[0].net} on {jobs[0].data_name}",
        f"{commands('held-out', found)} Top-1 in %. No arm has seen the images that it is judged by, and "
        "none of these images is in the test set.\n\n"
        + table(["arm", "epochs", "top-1", "MACs", "parameters", "blocks kept"], lines),
    )


def share_of(rows: list[dict[str, Any]], whole: dict[int, dict[str, Any]], key: str) -> str:
    """Return what is left of a cost, on average over the seeds."""
    return f"{statistics.fmean(r[key] / whole[min(whole)][key] for r in rows):.1%}"


def earlier(results: Rows) -> None:
    """Show what the same arms gave with the schedules that were tried before."""
    files = sorted((RESULTS.parent / "earlier").glob("*.json"))
    rows = [json.loads(f.read_text(encoding="utf-8")) for f in files]
    if not rows:
        return
    now = [(r, "as it is now", "") for n in {r["name"] for r in rows} if (r := results.get(n))]
    before = [(r, r["schedule"], f"`{r['commit']}`") for r in rows]
    lines = []
    for row, schedule, commit in sorted((*before, *now), key=lambda r: (r[0]["name"], not r[2])):
        name = row["name"]
        dense = results[name.replace(arm_named(name).arm, "dense")]  # of its suite and seed
        lines.append(
            [
                f"`{name}`",
                schedule,
                commit,
                f"{row['macs_after'] / dense['macs_after']:.1%}",
                f"{row['num_params_after'] / dense['num_params_after']:.1%}",
                ", ".join(row["layout"]),
                f"{row['top1']:.2f}",
                f"{row['top1'] - dense['top1']:+.2f}",
            ]
        )
    write_section(
        "Tried: schedules of sparse training",
        "Written by `python -m benchmarks.claims`. The same arms as above, with every schedule that was "
        "run on the test set; none was run twice. To dense: the dense net of the same seed and epochs. "
        "Differences of a few tenths of a point are within what a seed does.\n\n"
        + table(
            ["arm", "schedule", "commit", "MACs", "parameters", "blocks kept", "top-1", "to dense"],
            lines,
        ),
    )


def rankings(results: Rows) -> None:
    """C4: what the scales choose, against other rankings."""
    jobs = SUITES["rankings"]
    found = done(jobs, results)
    if not found:
        return
    lines = []
    for ranking in ("scales", *RANKINGS):
        mine = done([j for j in jobs if f"ranked-{ranking}-" in j.name], results)
        before = [r.get("top1_pruned", r["top1"]) for r in mine]
        lines.append(
            [
                "scales (sparse training)" if ranking == "scales" else ranking,
                spread(before),
                spread([r["top1"] for r in mine]),
                "; ".join(" ".join(r["layout"]) for r in mine),
            ]
        )
    job = jobs[1]
    write_section(
        "C4: which branches go, by ranking",
        f"{commands('rankings', found)} {job.net} on digits to {job.macs:.0%} of the MACs, whole "
        f"residual branches only; all arms from the same dense nets ({jobs[0].epochs} epochs), then "
        f"{job.epochs} epochs each. Rankings other than the scales remove all branches at once, and "
        "train afterwards; with sparse training nothing is trained after the removal.\n\n"
        + table(
            ["ranking", "top-1 right after removal", "top-1 at the end", "blocks kept, per seed"],
            lines,
        ),
    )


def rates(results: Rows) -> None:
    """C6: accuracy right after pruning, over the pruning rate."""
    jobs = SUITES["rates"]
    found = done(jobs, results)
    if not found:
        return
    whole = [r["top1"] for r in found if "/whole-" in r["name"]]
    shares = sorted({j.macs for j in jobs if j.macs is not None}, reverse=True)
    lines, points = [], []
    for share in shares:
        mine = done([j for j in jobs if j.macs == share], results)
        top1 = [r["top1"] for r in mine]
        change = [r["top1"] - r["top1_training_form"] for r in mine]
        kept = [r["macs_after"] / results[r["start"]]["macs_after"] for r in mine]
        if not mine:
            lines.append([f"{100 * share:g}%", "", MISSING, "", ""])
            continue
        points.append((100 * (1 - statistics.fmean(kept)), top1))
        lines.append(
            [
                f"{100 * share:g}%",
                f"{statistics.fmean(kept):.1%}",
                spread(top1),
                f"{statistics.fmean(top1) - statistics.fmean(whole):+.2f}" if whole else "",
                f"{max(change, key=abs):+.2f}",
            ]
        )
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
    for rate, values in points:
        axes.plot([rate] * len(values), values, "o", color="#c0392b", markersize=4)
    axes.plot([r for r, _ in points], [statistics.fmean(v) for _, v in points], color="#c0392b")
    if whole:
        axes.axhline(statistics.fmean(whole), color="#7f8c8d", linestyle="--", linewidth=1)
        axes.text(1, statistics.fmean(whole), "dense, same epochs", va="bottom", color="#7f8c8d")
    axes.set(xlabel="MACs removed (%)", ylabel="top-1 right after pruning (%)", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    job = next(j for j in jobs if j.kind == "ours")
    write_section(
        "C6: accuracy right after pruning, without retraining",
        f"{commands('rates', found)} {job.net} on digits; dense for {jobs[0].epochs} epochs, sparse "
        f"training for {job.epochs}, and nothing after the removal. The dense net trained for as many "
        f"epochs in all: {spread(whole)} %.\n\n"
        + table(
            ["target", "MACs", "top-1", "points to dense", "largest change by removal itself"],
            lines,
        )
        + f"\n\n{picture(figure, 'rates', 'Top-1 right after pruning over MACs removed')}",
    )


def scales(results: Rows) -> None:
    """C4: the scales over sparse training, of the first seed (the others look alike)."""
    parts = []
    for row in results.values():
        chosen = row["kind"] in ("ours", "once") and row["data"] == NAMES[CIFAR]
        if not chosen or row["seed"]:
            continue
        gone = set(row["remove"])
        figure, axes = pyplot.subplots(figsize=(8, 3.4))
        steps = [step for step, _ in row["history"]]
        for name in row["history"][0][1]:
            color = "#c0392b" if name in gone else "#7f8c8d"
            values = [found[name] for _, found in row["history"]]
            axes.plot(steps, values, color=color, linewidth=1, alpha=0.8, zorder=2 + (name in gone))
        axes.plot([], [], color="#c0392b", label=f"removed ({len(gone)})")
        axes.plot([], [], color="#7f8c8d", label=f"kept ({row['num_units'] - len(gone)})")
        axes.set(xlabel="optimizer step", ylabel="layer scaling factor s")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        job = arm_named(row["name"])
        start = "one run" if job.kind == "once" else "from the dense net"
        start += f", {job.taught}" if job.taught else ""
        title = f"{job.net} to {job.held_to}, {start}, {job.epochs} epochs of sparse training"
        parts.append(
            f"{title}; {row['date']}, seed {row['seed']}, {row['machine']}. Removed: "
            + ", ".join(f"`{n}`" for n in row["remove"])
            + f".\n\n{picture(figure, 'scales-' + row['name'].replace('/', '-'), title)}"
        )
    if parts:
        write_section(
            "C4: the scales over sparse training, CIFAR-10 (JPEG)",
            "Written by `python -m benchmarks.claims` from the runs of `python -m "
            "benchmarks.accuracy resnet56`. No strength was set; the target alone steers.\n\n"
            + "\n\n".join(parts),
        )


def picture(figure: Any, name: str, alt: str) -> str:
    """Save a plot as SVG beside the page, and return the Markdown that shows it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "resconv"}):  # the same plot is the same file
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    folder: Path = DOCS / "images"
    folder.mkdir(exist_ok=True)
    text = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
    write_text(folder / f"{name}.svg", text + "\n")
    return f"![{alt}](images/{name}.svg)"


def readme(results: Rows) -> None:
    """Write the headline figures between the markers in README.md."""
    suite = "resnet56-further"
    records = [r for r in read_records() if r["net"] == "resnet56" and r["threads"] == 1]
    jobs = {j.arm: j for j in SUITES[suite] if j.arm != "start"}
    dense = jobs.pop("dense")
    if not records or not rows_of(suite, dense.arm, results):
        return
    lines = [headline(records[0], dense, suite, results)]
    for record in records:
        mine = [j for j in jobs.values() if j.macs == record["share"]]
        lines += [headline(record, job, suite, results) for job in mine]
    header = ["ResNet-56", "MACs", "top-1", "to dense", "by seed", "ONNX Runtime", "peak memory"]
    text = (
        f"{table(header, [line for line in lines if line])}\n\nCIFAR-10 (JPEG), {epochs_of(dense)} epochs in "
        "all for every arm, the dense net they start from among them; pruned nets were trained to follow "
        "its outputs too. Top-1 in % (seeds 0, 1, ... as far as they were run), latency at batch 1 and memory "
        f"of seed 0 as shares of the dense net's, {latest(suite, results)}. resconv is held to a share of the "
        "MACs and of the parameters, or to the MACs only. Written by `python -m benchmarks.claims`; "
        "conditions, shorter schedules and everything else that was measured: "
        "[docs/results.md](docs/results.md); goals that were missed, and why: "
        f"[there](docs/results.md#{anchor(MISSES)})."
    )
    deeper = []
    for suite in ("resnet110", "resnet110-further"):
        starts = rows_of(suite, "start", results)
        for job in {j.arm: j for j in SUITES[suite] if j.arm != "start"}.values():
            if rows := list(rows_of(suite, job.arm, results).values()):
                share = share_of(rows, starts, "macs_after")
                top1 = ", ".join(f"{r['top1']:.2f}" for r in rows)
                deeper.append([job.net, words_for(job), schedule_of(job), share, top1])
    text += "\n\nA deeper net:\n\n" + table(["net", "what", "epochs", "MACs", "top-1"], deeper)
    pairs = {
        net: top1_with_and_without("plain", net, results)
        for net in dict.fromkeys(job.net for job in SUITES["plain"])
    }
    trained = [
        [net, spread(plain), spread(ours)] for net, (plain, ours) in pairs.items() if plain and ours
    ]
    text += (
        f"\n\nNets trained for {SUITES['plain'][0].epochs} epochs on CIFAR-10 (JPEG) as they are and with "
        "ResConv, nothing removed, top-1 in %, one seed:\n\n"
        + table(["net", "plain", "with ResConv"], trained)
    )
    page = DOCS.parent / "README.md"
    before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- figures -->\n")
    _, end, after = rest.partition("<!-- end of figures -->\n")
    assert end, "README.md has lost its markers"
    write_text(page, f"{before}{mark}{text}\n{end}{after}")


def latest(suite: str, results: Rows) -> str:
    return str(max(row["date"] for row in done(SUITES[suite], results)))


def headline(record: dict[str, Any], job: Job, suite: str, results: Rows) -> list[str]:
    """Return a line of the README: an arm's accuracy, and its latency and memory as shares."""
    rows = rows_of(suite, job.arm, results)
    timed = by_arm(record)
    label = {"dense": "dense", "torch-pruning": "Torch-Pruning"}.get(job.kind, job.label)
    if not rows or label not in timed:
        return []
    named = {"dense": "dense", "torch-pruning": "Torch-Pruning (filters)"}
    limited = "MACs only, layers" if job.num_params is None else "layers"
    points = gains(suite, job.arm, "dense", results) if job.macs is not None else []
    return [
        named.get(job.kind, f"resconv ({limited})"),
        share_of(list(rows.values()), rows_of(suite, "dense", results), "macs_after"),
        f"{statistics.fmean(r['top1'] for r in rows.values()):.2f}",
        f"{statistics.fmean(points):+.2f}" if points else "",
        ", ".join(f"{r['top1']:.2f}" for _, r in sorted(rows.items())),
        f"{share_of_dense(timed, label, GOAL):.2f}x",
        f"{share_of_dense(timed, label, 'peak_memory_bytes'):.2f}x",
    ]


WRITERS: tuple[Callable[[Rows], None], ...] = (
    *(partial(compare, s) for s in COMPARED),
    choices,
    earlier,
    with_resconv,
    scales,
    rankings,
    rates,
    readme,
    goals,
    misses,
)


def main() -> None:
    results = read_results()
    for write in WRITERS:
        write(results)


if __name__ == "__main__":
    main()
