"""Latency on a GPU at equal MACs: fewer layers against thinner layers.

``python -m benchmarks.gpu_latency [NET [SHARE]]``. The nets of ``benchmarks.latency`` in bf16,
channels-last: launched layer by layer, and recorded as one CUDA graph, which costs no launches.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resconv.latency.timing import time_together, torch_runner

from .arms import read_results
from .latency import arms, choices
from .page import stamp, table, write_section

SKIPPED = ("single weights", "CKA", "Consensus")


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


def main() -> None:
    net = sys.argv[1] if len(sys.argv) > 1 else "resnet56"
    share = float(sys.argv[2]) if len(sys.argv) > 2 else 0.5
    chosen = choices(net, share, read_results())
    found = {
        name: copy.deepcopy(m).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
        for name, m in arms(net, share, chosen).items()
        if not name.startswith(SKIPPED)
    }
    columns: dict[str, dict[str, float]] = {}
    for batch in (1, 128):
        x = torch.randn(batch, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        for how, runner in (("eager", torch_runner), ("recorded", recorded)):
            timings = time_together({n: runner(m, x) for n, m in found.items()}, repeats=100)
            columns[f"{how}, batch {batch}"] = {n: t.median_ms for n, t in timings.items()}
    lines = []
    for name in found:
        cells = [name]
        for taken in columns.values():
            ms, base = taken[name], taken["dense"]
            cells.append(f"{ms:.3f} ms" if name == "dense" else f"{ms / base:.2f}x")
        lines.append(cells)
    plans = "; ".join(f"{n}: {how}" for n, (_, how) in chosen.items())
    write_section(
        f"Latency on a GPU: {net} at {share:.0%} of the MACs",
        f"{stamp()} bf16, channels last, interleaved in random order, medians; all arms but dense are "
        f"ratios to dense. Units of {plans}.\n\n{table(['arm', *columns], lines)}",
    )


if __name__ == "__main__":
    main()
