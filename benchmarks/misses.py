"""Why goals were missed, and what was tried: the text of a section, its figures from benchmarks/results/."""

import statistics
from typing import Any

from .arms import COMPARED, OURS, SUITES, Job, Rows, epochs_in, gains
from .latency import GOAL, LAYOUTS, by_arm, read_records, share_of_dense
from .page import table, write_section

__all__ = ["TITLE", "misses"]

TITLE = "Where it did not hold: why, and what was tried"


def misses(results: Rows) -> None:
    records = [r for r in read_records() if r["threads"] == 1]
    write_section(
        TITLE,
        "Worked out by `python -m benchmarks.claims` from the measurements below. A goal that was missed "
        "stays as it was set.\n\n"
        + "\n\n".join((why_latency(records), why_memory(records), what_was_tried(results))),
    )


def why_latency(records: list[dict[str, Any]]) -> str:
    rates, timed = [], []
    for record in records:
        rows = by_arm(record)
        shares = {arm: share_of_dense(rows, arm, GOAL) for arm in rows}
        ours = [shares[arm] for arm in record["plans"]]
        timed.append((record, shares["Torch-Pruning"], ours))
        # Made by removing layers or blocks, ours or as published.
        whole = [arm for arm in rows if arm in record["plans"] or arm in LAYOUTS]
        rates += [shares[arm] / share_of_dense(rows, arm, "macs") for arm in whole]
    lines = [
        [
            record["net"],
            f"{100 * record['share']:g}%",
            f"{theirs:.2f}x",
            f"{0.65 * theirs:.2f}x",
            " to ".join(dict.fromkeys((f"{min(ours):.2f}x", f"{max(ours):.2f}x"))),
            f"{0.65 * theirs / statistics.fmean(rates):.0%}",
        ]
        for record, theirs, ours in timed
    ]
    return (
        "**0.65x of Torch-Pruning's latency.** What is left after whole layers went costs what it cost "
        f"before: the {len(rates)} nets that were timed so on one thread take {min(rates):.2f} to "
        f"{max(rates):.2f} of the dense net's latency for each of its MACs, whichever stages they keep. "
        "Their share of the latency is thus their share of the MACs, and to choose other layers does not "
        "move it. How much faster that is than thinner layers depends on what these lose by being thin, and "
        "they lose the more, the more of them goes. The "
        "last column is what a net of whole layers would have to keep at most to reach the goal there.\n\n"
        + table(
            [
                "net",
                "MACs",
                "Torch-Pruning, ONNX Runtime, batch 1",
                "0.65x of it",
                "resconv",
                "MACs that allow",
            ],
            lines,
        )
    )


def why_memory(records: list[dict[str, Any]]) -> str:
    apart = []
    for record in records:
        rows = by_arm(record)
        for arm in record["plans"]:
            peak, file = (
                share_of_dense(rows, arm, cost) for cost in ("peak_memory_bytes", "file_bytes")
            )
            apart.append(peak - file)
    dense = next(by_arm(r)["dense"] for r in records if r["net"] == "resnet56")
    return (
        "**Peak memory no larger than Torch-Pruning's.** At batch 1 it is mostly weights: "
        f"{dense['file_bytes'] / 1024:,.0f} KiB of the {dense['peak_memory_bytes'] / 1024:,.0f} KiB of "
        "resnet56. A net that is held to MACs alone may keep the last stage, where each of its MACs "
        "needs the most parameters; so the share of the peak memory is that of the file plus "
        f"{min(apart):.2f} to {max(apart):.2f}, and not that of the MACs. Tried: a budget for both "
        "(`--macs 0.5 --params 0.5`). The rows of C5 above say where that is enough; those of nets not held "
        'to parameters are marked "MACs only". What it costs in accuracy is below.'
    )


def what_was_tried(results: Rows) -> str:
    found: list[tuple[Job, str, float, int]] = []
    for suite in COMPARED:
        for job in {j.arm: j for j in SUITES[suite] if j.kind in OURS}.values():
            if points := gains(suite, job.arm, "dense", results):
                found.append((job, epochs_in(suite), statistics.fmean(points), len(points)))
    # By net and target, the worst first.
    found.sort(key=lambda line: (line[0].net, -(line[0].macs or 0), line[2]))
    lines = [
        [job.net, job.held_to, schedule, how(job), f"{points:+.2f}", str(seeds)]
        for job, schedule, points, seeds in found
    ]
    return (
        "**Accuracy.** What each way of training lost against the dense net of as many epochs, the worst "
        "first. Hints, mixup, CutMix, other rates and other schedules of the zeros were tried as well "
        '("Tried: schedules of sparse training", "Nets and their teacher"). Differences of a few tenths of a '
        "point are within what a seed does.\n\n"
        + table(["net", "held to", "epochs", "how", "points to dense", "seeds"], lines)
    )


def how(job: Job) -> str:
    again = "trained anew after the removal" if job.kind == "finetuned" else ""
    return ", ".join(filter(None, (job.taught, again))) or "sparse training alone"
