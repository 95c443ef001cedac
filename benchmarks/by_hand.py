"""Latency of a pruned ResNet against the same shallow net written by hand (goal: within 3 %)."""

import tempfile
from pathlib import Path

import torch

import resconv
from resconv import nets
from resconv.latency.timing import onnx_runner, time_together, torch_runner, torch_threads
from resconv.nets.resnet import ResidualBlock, ResNet

from .page import stamp, table, write_section


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    model = nets.create("resnet56").eval()
    gated = resconv.convert(model, x, units="blocks")
    # Keep three blocks of nine in each stage; the first ones, as the hand-written net has them.
    drop = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3, 9)]
    compact = resconv.fuse(resconv.prune(gated, resconv.Plan(drop)), x)
    by_hand = resconv.fuse(ResNet(ResidualBlock, 3).eval(), x)
    assert resconv.count(compact, x) == resconv.count(by_hand, x)
    rows = []
    with torch_threads(1), tempfile.TemporaryDirectory() as folder:
        for batch in (1, 32):
            inputs = torch.randn(batch, 3, 32, 32)
            files = {}
            for name, net in (("compact", compact), ("by hand", by_hand)):
                files[name] = resconv.export(net, Path(folder) / f"{name}.onnx", x).path
            timings = time_together(
                {
                    **{
                        f"torch/{n}": torch_runner(m, inputs)
                        for n, m in (("compact", compact), ("by hand", by_hand))
                    },
                    **{f"onnxruntime/{n}": onnx_runner(f, inputs, 1) for n, f in files.items()},
                },
                repeats=300 if batch == 1 else 60,
                warmup=10,
            )
            for runtime in ("torch", "onnxruntime"):
                a = timings[f"{runtime}/compact"].median_ms
                b = timings[f"{runtime}/by hand"].median_ms
                rows.append([runtime, str(batch), f"{a:.3f}", f"{b:.3f}", f"{a / b:.3f}"])
    write_section(
        "Compact net against the same net written by hand",
        f"{stamp()} One thread, interleaved, medians. resnet56 with 3 of 9 blocks kept in each "
        "stage, against a resnet20 written as such; norms folded in both.\n\n"
        + table(["runtime", "batch", "compact (ms)", "by hand (ms)", "ratio"], rows),
    )


if __name__ == "__main__":
    main()
