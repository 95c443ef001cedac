"""Latency, memory and file size of pruned nets, all timed in the same rounds: fewer layers against thinner ones.

    python -m benchmarks.latency EXPERIMENT SHARE [--threads N] [--device cuda]

The nets of one experiment that were pruned towards SHARE of the MACs, rebuilt from the units that their rows name
(weights do not matter for latency), beside Torch-Pruning, uniformly thinner nets and published layouts. Every net has
its norms folded. Appends one row a net to ``results.jsonl``; ratios are to the dense net. On a GPU: bf16 and
channels-last, launched layer by layer and recorded as one CUDA graph.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resconv
from resconv import nets
from resconv.latency.timing import (
    onnx_runner,
    peak_memory,
    time_together,
    torch_runner,
    torch_threads,
)
from resconv.nets.resnet import ResNet

from . import peers
from .run import add_row, rows

Times = dict[str, dict[str, float]]  # of each net, by runtime and batch
ROUNDS = {1: 200, 32: 40}


def chosen(experiment: str, share: float) -> dict[str, dict[str, Any]]:
    """Return the rows of the experiment's pruned nets, by arm; of several seeds the first."""
    found = [r for r in rows(experiment=experiment, target_macs=share) if "removed_units" in r]
    if not found:
        raise SystemExit(f"{experiment} has no net pruned towards {share:g} of the MACs.")
    return {r["arm"]: r for r in sorted(found, key=lambda r: -r["seed"])}


def arms(net: str, share: float, ours: dict[str, list[str]]) -> dict[str, nn.Module]:
    """Return the nets to compare at ``share`` of the MACs of ``net``, the dense one first."""
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    dense = nets.create(net).eval()
    found = {"dense": dense}
    found |= {name: peers.without_units(dense, example, remove) for name, remove in ours.items()}
    option_b = ResNet(peers.ConvShortcutBlock, peers.blocks_a_stage(net)).eval()
    for name, made in (
        ("", peers.prune_channels(dense, example, share)),
        (", round_to=8", peers.prune_channels(dense, example, share, round_to=8)),
        (", all channels", peers.prune_channels(option_b, example, share, inner_only=False)),
    ):
        if made is not None:  # rounded to 8 channels, not every share can be had
            found[f"Torch-Pruning{name}"] = made
    found["uniform width"] = peers.uniform_width(net, share, example)
    if net == "resnet56":
        for name, kept in peers.LAYOUTS.items():
            remove = peers.blocks_beyond(net, kept)
            found[name] = peers.without_units(dense, example, remove)
    return {n: resconv.fuse(m.eval(), example, fold_norms=True) for n, m in found.items()}


def recorded(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a call that replays the net's forward pass, recorded as a CUDA graph."""
    net.eval()
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            net(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        net(x)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


def on_gpu(found: dict[str, nn.Module]) -> Times:
    layout = {"memory_format": torch.channels_last}
    moved = {n: copy.deepcopy(m).to("cuda", torch.bfloat16, **layout) for n, m in found.items()}
    ms: Times = {n: {} for n in moved}
    for batch in (1, 128):
        x = torch.randn(batch, 3, 32, 32, device="cuda", dtype=torch.bfloat16).to(**layout)
        for how, runner in (("eager", torch_runner), ("recorded", recorded)):
            timings = time_together({n: runner(m, x) for n, m in moved.items()}, repeats=100)
            for name, timing in timings.items():
                ms[name][f"{how}, batch {batch}"] = timing.median_ms
    return ms


def on_cpu(found: dict[str, nn.Module], files: dict[str, Path], threads: int) -> Times:
    ms: Times = {n: {} for n in found}
    for batch in (1, 32):
        x = torch.randn(batch, 3, 32, 32)
        for runtime, runner in (
            ("torch", lambda n, x=x: torch_runner(found[n], x)),
            ("onnxruntime", lambda n, x=x: onnx_runner(files[n], x, threads)),
        ):
            calls = {n: runner(n) for n in found}
            for name, timing in time_together(calls, repeats=ROUNDS[batch], warmup=5).items():
                ms[name][f"{runtime}, batch {batch}"] = timing.median_ms
    return ms


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency")
    parser.add_argument("experiment")
    parser.add_argument("share", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    asked = parser.parse_args()
    ours = chosen(asked.experiment, asked.share)
    net = next(iter(ours.values()))["net"]
    found = arms(net, asked.share, {n: r["removed_units"] for n, r in ours.items()})
    example = torch.randn(1, 3, 32, 32)
    with torch_threads(asked.threads), tempfile.TemporaryDirectory() as folder:
        files = {n: Path(folder) / f"{i}.onnx" for i, n in enumerate(found)}
        bytes_of = {n: resconv.export(m, files[n], example).num_bytes for n, m in found.items()}
        ms = on_gpu(found) if asked.device == "cuda" else on_cpu(found, files, asked.threads)
    macs = {n: resconv.profile(found[n], example).macs for n in ms}
    peaks = {n: peak_memory(found[n], example) for n in ms}
    for name in ms:
        row = {
            "experiment": "latency",
            "of": asked.experiment,
            "net": net,
            "arm": name,
            "device": asked.device,
            "target_macs": asked.share,
            "threads": asked.threads,
            "macs": macs[name],
            "macs_share": round(macs[name] / macs["dense"], 4),
            "latency_ms": {k: round(v, 4) for k, v in ms[name].items()},
            "latency": {k: round(v / ms["dense"][k], 4) for k, v in ms[name].items()},
            "peak_memory_bytes": peaks[name],
            "peak_memory": round(peaks[name] / peaks["dense"], 4),
            "file_bytes": bytes_of[name],
        }
        add_row(row)


if __name__ == "__main__":
    main()
