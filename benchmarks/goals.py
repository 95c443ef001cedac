"""Each goal with what was measured for it, and whether it held: worked out from benchmarks/results/."""

import statistics
from dataclasses import dataclass
from typing import Any

from .arms import (
    COMPARED,
    OURS,
    SUITES,
    Rows,
    epochs_in,
    gains,
    rows_of,
    top1_with_and_without,
)
from .latency import EVEN, GOAL, by_arm, read_records, share_of_dense
from .page import table, write_section

__all__ = ["goals"]

Row = dict[str, Any]


# By net, at which percentage of the MACs it may lose how many points. ResNet-110 at -65.5 % is to lose
# none; the paper reports 0.13.
LOSSES = {"resnet56": ((50, 0.3), (35, 1.0)), "resnet110": ((34, 0.0),)}


@dataclass(frozen=True)
class Goal:
    """``held`` is None where something is still to be measured."""

    claim: str
    text: str
    measured: str
    held: bool | None
    tie: bool = False  # the seeds do not tell the two apart

    def cells(self) -> list[str]:
        words = {True: "held", False: "**did not hold**", None: "open"}
        word = "**a tie**" if self.tie else words[self.held]
        return [self.claim, self.text, self.measured or "not run", word]


def is_tie(points: list[float]) -> bool:
    """Whether the mean of paired differences is within its own standard error."""
    if len(points) < 2:
        return False
    return abs(statistics.fmean(points)) <= statistics.stdev(points) / len(points) ** 0.5


def difference(
    claim: str,
    text: str,
    found: list[float],
    at_least: float | None = None,
) -> Goal:
    """Return the goal for what an arm's top-1 gains on another's: ``found`` are points by seed.

    The mean is to be ``at_least`` so many points; None: above 0, by more than the seeds vary.
    """
    if not found:
        return Goal(claim, text, "", None)
    mean = statistics.fmean(found)
    each = ": " + ", ".join(f"{v:+.2f}" for v in found) if len(found) > 1 else ""
    measured = f"{mean:+.2f} points ({count_of_seeds(found)}{each})"
    if at_least is None:
        return Goal(claim, text, measured, mean > 0, is_tie(found))
    return Goal(claim, text, measured, round(mean, 2) >= at_least)


def count_of_seeds(values: list[float]) -> str:
    return f"{len(values)} seed{'s' * (len(values) > 1)}"


def training(results: Rows) -> list[Goal]:
    """C1: is the accuracy with ResConv higher? C2: do deep plain nets train at all?"""
    found = []
    for suite, where in (("digits", "digits"), ("plain", "CIFAR-10 (JPEG)")):
        for net in dict.fromkeys(job.net for job in SUITES[suite]):
            plain, ours = top1_with_and_without(suite, net, results)
            seeds = sum(j.net == net for j in SUITES[suite]) / 2
            done = len(plain) == len(ours) == seeds
            mean = [statistics.fmean(v) for v in (plain, ours) if v]
            measured = f"{mean[0]:.2f} -> {mean[1]:.2f} ({count_of_seeds(ours)})" if done else ""
            deep = net.startswith("plain") and int(net.removeprefix("plainnet")) > 50
            if deep and where == "digits":
                text, held = "at least 95 % with ResConv", done and mean[1] >= 95
            elif deep:
                text, held = "at least 10 points above plain", done and mean[1] >= mean[0] + 10
            else:
                text, held = "better with ResConv than plain", done and mean[1] > mean[0]
            claim = "C2" if deep else "C1"
            text = f"{net}, {where}: {text}"
            tie = done and not deep and is_tie(gains(suite, "resconv", "dense", results, net))
            found.append(Goal(claim, text, measured, held if done else None, tie))
    return sorted(found, key=lambda g: g.claim)


def accuracy(suite: str, results: Rows) -> list[Goal]:
    """What a net loses, against the dense net of as many epochs and against filter pruning."""
    found = []
    arms = {j.arm: j for j in SUITES[suite]}
    dense = arms["dense"]
    for share, most in LOSSES[dense.net]:
        mine = [
            j
            for j in arms.values()
            if j.kind in OURS and j.arm.endswith(f"-{share}") and rows_of(suite, j.arm, results)
        ]
        for job in mine:

            def points(other: str, arm: str = job.arm) -> list[float]:
                return gains(suite, arm, other, results)

            what = f"{dense.net}, CIFAR-10 (JPEG), {epochs_in(suite)} epochs, {job.held_to}"
            what += f", {job.taught}" if job.taught else ""
            limit = f"at most {most} points below" if most else "no worse than"
            claim = "C7" if dense.net == "resnet110" else "C6"
            found.append(
                difference(claim, f"{what}: {limit} the dense net", points("dense"), -most)
            )
            others = {"torch-pruning": "Torch-Pruning"}
            if job.distill:
                others["torch-pruning-distilled"] = "Torch-Pruning, distilled too"
            if job.arm == f"ours-{share}":
                others["scratch"] = "the same net from scratch"
            for other, name in others.items():
                if f"{other}-{share}" in arms:
                    claim = "control" if other == "scratch" else "C5"
                    text = f"{what}: better than {name}"
                    found.append(difference(claim, text, points(f"{other}-{share}")))
    return found


def speed() -> list[Goal]:
    """Latency in ONNX Runtime at batch 1 and peak memory, against filter pruning and the MACs."""
    found = []
    for record in read_records():
        for label in record["plans"]:
            found += speed_of(label, record)
    return found


def speed_of(label: str, record: Row) -> list[Goal]:
    """Return the goals for one of our nets, against what was timed with it."""
    rows = by_arm(record)
    marks = label.removeprefix("resconv").removeprefix(", ")
    limited = f" ({marks})" if marks else ""
    what = f"{record['net']}, {100 * record['share']:g}% of the MACs{limited}, threads: {record['threads']}"
    if record["plans"][label] == EVEN:
        what += ", units not trained for"
    found = []
    for name in ("Torch-Pruning", "Torch-Pruning, all channels"):
        if name not in rows:
            continue
        both = (label, name)
        mine, theirs = (share_of_dense(rows, arm, GOAL) for arm in both)
        text = f"{what}: latency at most 0.65x that of {name}"
        found.append(Goal("C5", text, f"{mine / theirs:.2f}x", mine / theirs <= 0.65))
        mine, theirs = (share_of_dense(rows, arm, "peak_memory_bytes") for arm in both)
        text = f"{what}: peak memory no larger than that of {name}"
        found.append(Goal("C5", text, f"{mine:.3f} and {theirs:.3f} of dense", mine <= theirs))
    latency, macs = (share_of_dense(rows, label, cost) for cost in (GOAL, "macs"))
    text = f"{what}: no larger share of the latency than of the MACs"
    found.append(Goal("C5", text, f"{latency:.3f} and {macs:.3f}", latency <= macs))
    return found


def goals(results: Rows) -> None:
    found = [*training(results), *speed()]
    for suite in COMPARED:
        found += accuracy(suite, results)
    found.sort(key=lambda g: g.claim)
    write_section(
        "Goals, and whether they held",
        "Worked out by `python -m benchmarks.claims` from the measurements below, which name their "
        "commands, seeds, dates and machines. C1 to C7 are the claims of docs/method.md's paper. A tie: the "
        "mean of the differences by seed is within its standard error. One seed alone "
        "says little: the rows with several show how far seeds lie apart. Open: what is compared with was "
        "not run. Nets of ours that were not run are in the tables below.\n\n"
        + table(["claim", "goal", "measured", ""], [g.cells() for g in found]),
    )
