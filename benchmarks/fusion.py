"""C3: after training, a ResConv is an ordinary conv: same operations, same latency as the plain net."""

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import torch
from torch import nn

import resconv
from resconv import nets
from resconv.latency.timing import onnx_runner, time_together, torch_runner, torch_threads
from tests.helpers import randomise, randomise_gates

from .page import stamp, table, write_section


def operations(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def main() -> None:
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = []
    for name in ("plainnet56", "resnet56", "vgg16_bn"):
        torch.manual_seed(0)
        plain = randomise(nets.create(name))
        trained = randomise_gates(resconv.convert(plain, x, units="layers"))
        found: dict[str, nn.Module] = {
            "plain": resconv.fuse(plain, x),
            "fused": resconv.fuse(trained, x),
        }
        error = resconv.verify(trained, found["fused"], x).max_rel_error
        with torch_threads(1), tempfile.TemporaryDirectory() as folder:
            files = {
                n: resconv.export(m, Path(folder) / f"{n}.onnx", x).path for n, m in found.items()
            }
            same = operations(files["plain"]) == operations(files["fused"])
            timings = time_together(
                {
                    **{f"torch/{n}": torch_runner(m, x) for n, m in found.items()},
                    "torch/training form": torch_runner(trained, x),
                    **{f"onnxruntime/{n}": onnx_runner(f, x, 1) for n, f in files.items()},
                },
                repeats=200,
                warmup=10,
            )
        ms = {n: t.median_ms for n, t in timings.items()}
        rows.append(
            [
                name,
                str(len(resconv.gates(trained))),
                f"{error:.0e}",
                "the same" if same else "DIFFERENT",
                f"{ms['onnxruntime/fused'] / ms['onnxruntime/plain']:.3f}",
                f"{ms['torch/fused'] / ms['torch/plain']:.3f}",
                f"{ms['torch/training form'] / ms['torch/plain']:.3f}",
            ]
        )
    write_section(
        "C3: fused against plain",
        f"{stamp()} Batch 1, one thread, interleaved, medians; latencies are ratios to the plain net "
        "with its norms folded. Random weights, statistics, scales and controls; nothing "
        "removed. The error is fused against training form, relative, in float32.\n\n"
        + table(
            [
                "net",
                "ResConvs",
                "error",
                "ONNX operations",
                "fused, ONNX Runtime",
                "fused, torch",
                "training form, torch",
            ],
            rows,
        ),
    )


if __name__ == "__main__":
    main()
