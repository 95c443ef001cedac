"""Why goals were missed, and what was tried: the text of a section, its figures from benchmarks/results/."""

import statistics
from typing import Any

from .arms import COMPARED, OURS, SUITES, Job, Rows, epochs_of, gains, start_of
from .latency import LAYOUTS, read_records
from .page import table, write_section

__all__ = ["misses"]

Row = dict[str, Any]

KEY = "onnxruntime, batch 1"


def misses(results: Rows) -> None:
    write_section(
        "Where it did not hold: why, and what was tried",
        "Worked out by `python -m benchmarks.claims` from the measurements below. A goal that was missed "
        "stays as it was set.\n\n"
        + "\n\n".join((why_latency(), why_memory(), what_was_tried(results))),
    )


def records() -> list[tuple[Row, dict[str, Row]]]:
    """Return what was timed on one thread: each record with its rows by arm."""
    found = [r for r in read_records() if r["threads"] == 1]
    return [(r, {row["arm"]: row for row in r["rows"]}) for r in found]


def share(rows: dict[str, Row], arm: str, key: str) -> float:
    """Return one of an arm's costs as a share of the dense net's."""
    if key == KEY:
        return float(rows[arm]["latency_ms"][KEY] / rows["dense"]["latency_ms"][KEY])
    return float(rows[arm][key] / rows["dense"][key])


def by_layers(rows: dict[str, Row]) -> list[str]:
    """Return the arms that were made by removing layers or blocks."""
    return [arm for arm in rows if arm.startswith("resconv") or arm in LAYOUTS]


def why_latency() -> str:
    rates = [
        share(rows, arm, KEY) / share(rows, arm, "macs")
        for _, rows in records()
        for arm in by_layers(rows)
    ]
    lines = []
    for record, rows in records():
        theirs = share(rows, "Torch-Pruning", KEY)
        mine = [arm for arm in rows if arm.startswith("resconv")]
        lines.append(
            [
                record["net"],
                f"{100 * record['share']:g}%",
                f"{theirs:.2f}x",
                f"{0.65 * theirs:.2f}x",
                " to ".join(
                    dict.fromkeys(
                        f"{f(share(rows, a, KEY) for a in mine):.2f}x" for f in (min, max)
                    )
                ),
                f"{0.65 * theirs / statistics.fmean(rates):.0%}",
            ]
        )
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


def why_memory() -> str:
    mine = [(rows, a) for _, rows in records() for a in rows if a.startswith("resconv")]
    apart = [share(rows, a, "peak_memory_bytes") - share(rows, a, "file_bytes") for rows, a in mine]
    dense = next(rows["dense"] for record, rows in records() if record["net"] == "resnet56")
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
        arms = {j.arm: j for j in SUITES[suite]}
        before, total = epochs_of(start_of(suite)), epochs_of(arms["dense"])
        for job in arms.values():
            points = gains(suite, job.arm, "dense", results) if job.kind in OURS else []
            if points:
                schedule = f"{before} + {total - before}"
                found.append((job, schedule, statistics.fmean(points), len(points)))
    # By net and target, the worst first.
    found.sort(key=lambda line: (line[0].net == "resnet110", -(line[0].macs or 0), line[2]))
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
