"""Each goal with what was measured for it, and whether it held: worked out from benchmarks/results/."""

import json
import statistics
from dataclasses import dataclass
from typing import Any

from .arms import SUITES, chosen_arm
from .latency import RESULTS as LATENCY
from .page import table, write_section

__all__ = ["goals"]

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """``held`` is None where something is still to be measured."""

    claim: str
    text: str
    measured: str
    held: bool | None

    def cells(self) -> list[str]:
        words = {True: "held", False: "**did not hold**", None: "open"}
        return [self.claim, self.text, self.measured or "not run", words[self.held]]


def training(results: Rows) -> list[Goal]:
    """C1: is the accuracy with ResConv higher? C2: do deep plain nets train at all?"""
    found = []
    for suite, where in (("digits", "digits"), ("plain", "CIFAR-10 (JPEG)")):
        for net in dict.fromkeys(job.net for job in SUITES[suite]):
            jobs = [j for j in SUITES[suite] if j.net == net]
            plain, ours = (
                [results[j.name]["top1"] for j in jobs if j.kind == kind and j.name in results]
                for kind in ("dense", "resconv")
            )
            done = len(plain) == len(ours) == len(jobs) / 2
            mean = [statistics.fmean(v) for v in (plain, ours) if v]
            measured = (
                f"{mean[0]:.2f} -> {mean[1]:.2f} ({len(ours)} seed{'s' * (len(ours) > 1)})"
                if done
                else ""
            )
            deep = net.startswith("plain") and int(net.removeprefix("plainnet")) > 50
            if deep and where == "digits":
                text, held = "at least 95 % with ResConv", done and mean[1] >= 95
            elif deep:
                text, held = "at least 10 points above plain", done and mean[1] >= mean[0] + 10
            else:
                text, held = "better with ResConv than plain", done and mean[1] > mean[0]
            claim = "C2" if deep else "C1"
            found.append(Goal(claim, f"{net}, {where}: {text}", measured, held if done else None))
    return sorted(found, key=lambda g: g.claim)


def accuracy(results: Rows) -> list[Goal]:
    """What resnet56 loses, against the dense net of as many epochs and against filter pruning."""
    dense = results.get("cifar/resnet56/dense")
    found = []
    for share, most in ((50, 0.3), (35, 1.0)):
        for arm, words in (("ours", "MACs and parameters"), ("ours-macs", "MACs")):
            row = results.get(f"cifar/resnet56/{arm}-{share}")
            filters = results.get(f"cifar/resnet56/torch-pruning-{share}")
            what = f"resnet56, CIFAR-10 (JPEG), {share} % of the {words}"
            change = row["top1"] - dense["top1"] if row and dense else None
            found.append(
                Goal(
                    "C6",
                    f"{what}: at most {most} points below the dense net",
                    "" if change is None else f"{change:+.2f} points",
                    None if change is None else round(change, 2) >= -most,
                )
            )
            scratch = results.get(f"cifar/resnet56/scratch-{share}") if arm == "ours" else None
            for other, claim, name in (
                (filters, "C5", "Torch-Pruning"),
                (scratch, "control", "the same net from scratch"),
            ):
                if other is None:
                    continue
                gain = row["top1"] - other["top1"] if row else None
                found.append(
                    Goal(
                        claim,
                        f"{what}: better than {name}",
                        "" if gain is None else f"{gain:+.2f} points",
                        None if gain is None else gain > 0,
                    )
                )
    return found


def speed(results: Rows) -> list[Goal]:
    """Latency in ONNX Runtime at batch 1 and peak memory, against filter pruning and the MACs."""
    found = []
    files = sorted(LATENCY.glob("*.json"), key=lambda f: f.stem)
    for file in files:
        record = json.loads(file.read_text(encoding="utf-8"))
        rows = {r["arm"]: r for r in record["rows"]}
        dense, ours = rows["dense"], rows["resconv"]
        net, share = record["net"], record["share"]
        what = f"{net}, {share:.0%} of the MACs, threads: {record['threads']}"
        if chosen_arm(net, share, results) is None:
            what += ", units not trained for"

        def ms(row: dict[str, Any]) -> float:
            return float(row["latency_ms"]["onnxruntime, batch 1"])

        for name in ("Torch-Pruning", "Torch-Pruning, all channels"):
            if name not in rows:
                continue
            ratio = ms(ours) / ms(rows[name])
            text = f"{what}: latency at most 0.65x that of {name}"
            found.append(Goal("C5", text, f"{ratio:.2f}x", ratio <= 0.65))
            memory = [
                r["peak_memory_bytes"] / dense["peak_memory_bytes"] for r in (ours, rows[name])
            ]
            text = f"{what}: peak memory no larger than that of {name}"
            measured = f"{memory[0]:.3f} and {memory[1]:.3f} of dense"
            found.append(Goal("C5", text, measured, memory[0] <= memory[1]))
        macs, latency = ours["macs"] / dense["macs"], ms(ours) / ms(dense)
        text = f"{what}: no larger share of the latency than of the MACs"
        found.append(Goal("C5", text, f"{latency:.3f} and {macs:.3f}", latency <= macs))
    return found


def goals(results: Rows) -> None:
    found = [*training(results), *accuracy(results), *speed(results)]
    share = next(j for j in SUITES["resnet110"] if j.name.endswith("/ours-34"))
    dense, ours = results.get("cifar/resnet110/dense"), results.get(share.name)
    change = ours["top1"] - dense["top1"] if ours and dense else None
    found.append(
        Goal(
            "C7",
            "resnet110, CIFAR-10 (JPEG), -65.5 % of the MACs: no loss (the paper: -0.13)",
            "needs a GPU" if change is None else f"{change:+.2f} points",
            None if change is None else change >= 0,
        )
    )
    found.sort(key=lambda g: g.claim)
    write_section(
        "Goals, and whether they held",
        "Worked out by `python -m benchmarks.claims` from the measurements below, which name their "
        "commands, seeds, dates and machines. C1 to C7 are the claims of docs/method.md's paper.\n\n"
        + table(["claim", "goal", "measured", ""], [g.cells() for g in found]),
    )
