"""Latency, memory and file size at equal MACs: fewer layers against thinner layers.

``python -m benchmarks.latency NET [THREADS [SHARE]]``, else at every share. Every arm has its norms
folded, runs on the same number of threads (1 unless given), and takes its turn in the same rounds. Weights
do not matter for latency, so the arms are not trained here; ours removes the units that sparse training
chose where such a run is at hand (benchmarks/results/accuracy), else evenly spread ones.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as weight_prune

import resconv
from resconv import nets
from resconv.files import write_text
from resconv.latency.timing import (
    onnx_runner,
    peak_memory,
    time_together,
    torch_runner,
    torch_threads,
)
from resconv.nets.resnet import ResidualBlock, ResNet

from .accuracy import blocks_a_stage, blocks_beyond, without_units
from .arms import TIMED, Rows, arm_named, read_results
from .channels import prune_channels
from .page import stamp, table, write_section

RESULTS = Path(__file__).parent / "results" / "latency"
GOAL = "onnxruntime, batch 1"  # what the goals for latency are about
# Of the MACs; by net, where it has shares of its own.
SHARES = {"resnet110": (0.5, 0.345, 0.25)}
COMMON_SHARES = (0.5, 0.35, 0.25)
# Where units were chosen on CIFAR-10, the first that there is.
TRAINED = ("cifar", "gpu", "onward")
EVEN = "evenly spread"  # how units are chosen that no run chose
# Blocks kept a stage, as published for ResNet-56 (docs/method.md names the sources).
LAYOUTS = {"CKA [5,2,5]": (5, 2, 5), "CKA [2,2,3]": (2, 2, 3), "Consensus [2,2,2]": (2, 2, 2)}


class ConvShortcutBlock(ResidualBlock):
    """A residual block whose shortcut is a 1x1 conv where channels or size change ("option B")."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        if self.shortcut is not None:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )


def choices(net: str, share: float, results: Rows) -> dict[str, tuple[list[str], str]]:
    """Return the units to remove to keep ``share`` of the MACs, and where each choice comes from."""
    found = {}
    for arm in TIMED:
        names = (f"{where}/{net}/{arm}-{round(100 * share)}" for where in TRAINED)
        row = next((results[n] for n in names if n in results), None)
        if row is None:
            continue
        job = arm_named(row["name"])
        how = f"chosen by sparse training towards {job.held_to} (`{job.name}`)"
        found[job.label] = (row["remove"], how)
    return found or {"resconv": (evenly(net, share), EVEN)}


def evenly(net: str, share: float) -> list[str]:
    """Return blocks to remove, as many of each stage, so that ``share`` of the MACs is kept."""
    blocks = blocks_a_stage(net)
    example = torch.randn(1, 3, 32, 32)
    whole = resconv.count(nets.create(net), example).macs
    for left in range(3 * blocks, 2, -1):  # take blocks evenly from the stages
        kept = tuple(left // 3 + (stage >= 3 - left % 3) for stage in range(3))
        remove = blocks_beyond(net, kept)
        if not remove:
            continue
        compact = without_units(net, 10, 3, 32, remove)
        if resconv.count(compact, example).macs <= share * whole:
            return remove
    raise AssertionError(f"{net} has no {100 * share:g}%")


def uniform_width(net: str, share: float) -> nn.Module:
    """Return the same net with all channels scaled alike, the widest within the MACs."""
    blocks = blocks_a_stage(net)
    example = torch.randn(1, 3, 32, 32)
    whole = resconv.count(nets.create(net), example).macs
    for width in range(16, 1, -1):
        thin = ResNet(ResidualBlock, blocks, width=width)
        if resconv.count(thin, example).macs <= share * whole:
            return thin
    raise AssertionError(f"{net} has no width for {100 * share:g}%")


def sparse_weights(model: nn.Module, share: float) -> nn.Module:
    """Return a copy with the smallest weights of the convs at 0, the tensors as large as before."""
    model = copy.deepcopy(model)
    convs = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d)]
    weight_prune.global_unstructured(
        convs, pruning_method=weight_prune.L1Unstructured, amount=1 - share
    )
    for module, name in convs:
        weight_prune.remove(module, name)
    return model


def arms(net: str, share: float, chosen: dict[str, tuple[list[str], str]]) -> dict[str, nn.Module]:
    """Return the nets to compare at ``share`` of the MACs of ``net``, the dense one first."""
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    dense = nets.create(net).eval()
    blocks = blocks_a_stage(net)
    found = {"dense": dense}
    found |= {n: without_units(net, 10, 3, 32, remove) for n, (remove, _) in chosen.items()}
    option_b = ResNet(ConvShortcutBlock, blocks).eval()
    for name, made in (
        ("", prune_channels(dense, example, share)),
        (", round_to=8", prune_channels(dense, example, share, round_to=8)),
        (", all channels", prune_channels(option_b, example, share, inner_only=False)),
    ):
        if made is not None:  # rounded to 8 channels, not every share can be had
            found[f"Torch-Pruning{name}"] = made[0]
    found |= {
        "uniform width": uniform_width(net, share),
        "single weights": sparse_weights(dense, share),
    }
    if (net, share) == ("resnet56", 0.5):
        for name, kept in LAYOUTS.items():
            found[name] = without_units(net, 10, 3, 32, blocks_beyond(net, kept))
    return {n: resconv.fuse(m.eval(), example) for n, m in found.items()}


def measure(
    found: dict[str, nn.Module], batch: int, folder: Path, threads: int, *, compiled: bool
) -> dict[str, dict[str, float]]:
    """Return milliseconds, by arm and runtime, all timed in the same rounds."""
    x = torch.randn(batch, 3, 32, 32)
    runners: dict[str, Callable[[], Any]] = {}
    for name, net in found.items():
        runners[f"{name}/torch"] = torch_runner(net, x)
        runners[f"{name}/onnxruntime"] = onnx_runner(file_of(folder, name), x, threads)
        if compiled:
            runners[f"{name}/torch.compile"] = torch_runner(torch.compile(copy.deepcopy(net)), x)
    timings = time_together(runners, repeats=200 if batch == 1 else 40, warmup=5)
    taken: dict[str, dict[str, float]] = {name: {} for name in found}
    for key, timing in timings.items():
        name, _, runtime = key.rpartition("/")
        taken[name][runtime] = timing.median_ms
    return taken


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{''.join(c for c in name if c.isalnum())}.onnx"


def result_of(net: str, share: float, threads: int) -> Path:
    more = "" if threads == 1 else f"-threads{threads}"
    return RESULTS / f"{net}-{round(100 * share)}{more}.json"


def compare(net: str, share: float, threads: int, *, compiled: bool) -> None:
    chosen = choices(net, share, read_results())
    found = arms(net, share, chosen)
    example: Tensor = torch.randn(1, 3, 32, 32)
    with torch_threads(threads), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {
            n: resconv.export(m, file_of(folder, n), example).num_bytes for n, m in found.items()
        }
        taken = {b: measure(found, b, folder, threads, compiled=compiled) for b in (1, 32)}
        when = stamp(command=f"python -m benchmarks.latency {net} {threads}")  # on these threads
    macs = {n: resconv.count(m, example).macs for n, m in found.items()}
    rows = [
        {
            "arm": n,
            "macs": macs[n],
            "latency_ms": {f"{r}, batch {b}": ms for b in taken for r, ms in taken[b][n].items()},
            "peak_memory_bytes": peak_memory(m, example),
            "file_bytes": sizes[n],
        }
        for n, m in found.items()
    ]
    record = {
        "net": net,
        "share": share,
        "threads": threads,
        "plans": {n: how for n, (_, how) in chosen.items()},
        "stamp": when,
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(result_of(net, share, threads), json.dumps(record, indent=1) + "\n")


def read_records() -> list[dict[str, Any]]:
    """Return all that was measured: by net, the largest share of the MACs and one thread first."""
    found = [json.loads(f.read_text(encoding="utf-8")) for f in RESULTS.glob("*.json")]
    return sorted(found, key=lambda r: (r["net"], -r["share"], r["threads"]))


def by_arm(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what was measured of each net of a record."""
    return {row["arm"]: row for row in record["rows"]}


def share_of_dense(rows: dict[str, dict[str, Any]], arm: str, cost: str) -> float:
    """Return one of an arm's costs, its time in a runtime among them, as a share of the dense net's."""
    mine, dense = (float((rows[a]["latency_ms"] | rows[a])[cost]) for a in (arm, "dense"))
    return mine / dense


def report(net: str) -> None:
    """Write the tables of a net from what was measured."""
    parts = []
    for record in read_records():
        if record["net"] != net:
            continue
        share, threads = record["share"], record["threads"]
        rows = by_arm(record)
        dense = rows["dense"]
        runtimes = list(dense["latency_ms"])
        lines = [
            [
                "dense",
                "100 %",
                *(f"{ms:.2f} ms" for ms in dense["latency_ms"].values()),
                f"{dense['peak_memory_bytes'] / 1024:,.0f} KiB",
                f"{dense['file_bytes'] / 1024:,.0f} KiB",
            ]
        ]
        costs = (*runtimes, "peak_memory_bytes", "file_bytes")
        for arm in rows:
            if arm != "dense":
                ratios = (f"{share_of_dense(rows, arm, cost):.2f}x" for cost in costs)
                lines.append([arm, f"{share_of_dense(rows, arm, 'macs'):.1%}", *ratios])
        plans = "; ".join(f"{n}: {how}" for n, how in record["plans"].items())
        header = ["arm", "MACs", *runtimes, "peak memory", "ONNX file"]
        parts.append(
            f"### {net} at {100 * share:g}% of the MACs, {threads} thread{'s' * (threads > 1)}\n\n"
            f"{record['stamp']} Interleaved in random order, medians; all arms but dense are ratios "
            f"to dense. Units of {plans}.\n\n{table(header, lines)}"
        )
    write_section(f"Latency at equal MACs: {net}", "\n\n".join(parts))


def main() -> None:
    net = sys.argv[1] if len(sys.argv) > 1 else "resnet56"
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    asked = tuple(map(float, sys.argv[3:]))
    for share in asked or SHARES.get(net, COMMON_SHARES):
        compiled = (net, share, threads) == ("resnet56", 0.5, 1)
        compare(net, share, threads, compiled=compiled)
    report(net)


if __name__ == "__main__":
    main()
