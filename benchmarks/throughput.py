"""Images a second of training, over the ways to run the same step on this machine.

``python -m benchmarks.throughput [NET [BATCH [ARM ...]]]``: all arms, or those named by what follows
their last comma (``eager``, ``recorded``, ...). CUDA graphs, recorded by us or by torch.compile's
reduce-overhead mode, need a GPU; without one there are no such arms.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import resconv
from resconv import nets
from resconv.latency.timing import time_together
from resconv.train import RecordedNet

from .page import stamp, table, write_section

# name -> (bf16 and channels-last, "recorded" as by `--cuda-graphs` or torch.compile's mode)
ARMS: dict[str, tuple[bool, str | None]] = {
    "float32, eager": (False, None),
    "bf16, channels last, eager": (True, None),
    "bf16, channels last, recorded": (True, "recorded"),
    "bf16, channels last, compiled": (True, "default"),
    "bf16, channels last, compiled and recorded": (True, "reduce-overhead"),
}
NEED_GPU = ("recorded", "reduce-overhead")


def step_of(net: str, batch: int, device: str, fast: bool, how: str | None) -> Any:
    """Return a call that takes one training step of the converted net under its Sparsifier."""
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    model = resconv.convert(nets.create(net), example, units="all").train().to(device)
    layout = torch.channels_last if fast else torch.contiguous_format
    model = model.to(memory_format=layout)
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=layout)
    labels = torch.arange(batch, device=device) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    resconv.Sparsifier(model, target=resconv.Budget(macs=0.5), total_steps=100_000).attach(
        optimizer
    )
    forward: Any = model
    if how == "recorded":
        forward = RecordedNet(model)
    elif how is not None:
        forward = torch.compile(model, mode=how)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=fast):
            loss = F.cross_entropy(forward(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    net = sys.argv[1] if len(sys.argv) > 1 else "resnet56"
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 128
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps: dict[str, Callable[[], None]] = {}
    asked = sys.argv[3:]
    for name, (fast, how) in ARMS.items():
        if asked and name.rpartition(", ")[2] not in asked:
            continue
        if how not in NEED_GPU or device == "cuda":
            steps[name] = step_of(net, batch, device, fast, how)
    timings = time_together(steps, repeats=100 if device == "cuda" else 8, warmup=3)
    base = timings["float32, eager"].median_ms
    rows = [
        [n, f"{t.median_ms:.1f}", f"{1e3 * batch / t.median_ms:,.0f}", f"{base / t.median_ms:.2f}x"]
        for n, t in timings.items()
    ]
    write_section(
        f"Training throughput of {net} on {device}, batch {batch}",
        f"{stamp()} Batch {batch} at 32x32, units='all' under a Sparsifier, interleaved, medians.\n\n"
        + table(["step", "ms", "images/s", "against eager float32"], rows),
    )


if __name__ == "__main__":
    main()
