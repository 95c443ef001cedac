"""A real pretrained net made shallower, beside the same net made thinner by Torch-Pruning, at equal latency.

    python -m benchmarks.pretrained ARM [--seeds 0,1,2]

EfficientNet-Lite0 with the ImageNet weights that its package ships, on 2,000 images of CIFAR-10 (JPEG) at 96 px:
dense training on those images, then as many epochs for every arm, taught by the dense net. An arm of ours is a run of
resconv (examples/pretrained.py). Torch-Pruning leaves the widest net that is as fast as ours in ONNX Runtime (batch 1,
one thread, timed in turn); it is trained alike. Appends rows to ``results.jsonl``; a stopped run goes on.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import resconv
from examples import pretrained
from resconv import run
from resconv.latency.timing import onnx_runner, time_together
from resconv.train import evaluate, fit

from . import peers
from .run import DATA, add_row, rows

WORK = Path("runs/pretrained")
DENSE_EPOCHS, SPARSE_EPOCHS, FINETUNE_EPOCHS = 3, 3, 3
COMMON: dict[str, Any] = {
    "image_size": 96,
    "limit": 2000,
    "batch_size": 32,
    "distill": True,
    "epochs": DENSE_EPOCHS,
    "sparse_epochs": SPARSE_EPOCHS,
    "finetune_epochs": FINETUNE_EPOCHS,
    "progress": False,
}
ARMS: dict[str, dict[str, Any]] = {
    "macs-60": {"macs": 0.6},
    "macs-60-all": {"macs": 0.6, "units": "all"},
    "latency-50-all": {"latency": 0.5, "runtime": "onnxruntime", "units": "all"},
}
REPEATS, WITHIN = 60, 0.02


def ratios(found: dict[str, nn.Module], example: torch.Tensor) -> dict[str, float]:
    """Return each net's latency in ONNX Runtime over that of the first, timed in turn on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        files = {
            n: resconv.export(m, Path(folder) / f"{i}.onnx", example).path
            for i, (n, m) in enumerate(found.items())
        }
        ms = time_together(
            {n: onnx_runner(f, example, 1) for n, f in files.items()}, repeats=REPEATS
        )
    first = next(iter(ms.values())).median_ms
    return {n: t.median_ms / first for n, t in ms.items()}


def thinner(dense: nn.Module, ours: nn.Module, example: torch.Tensor) -> nn.Module:
    """Return what Torch-Pruning leaves of the dense net where it is as fast as ours, by halving."""
    low, high, best = 0.05, 1.0, None
    for _ in range(6):
        share = (low + high) / 2
        net = peers.prune_channels(dense, example, share, inner_only=False)
        if net is None:
            low = share
            continue
        folded = resconv.fuse(net, example, fold_norms=True)
        ratio = ratios({"ours": ours, "thinner": folded}, example)["thinner"]
        if ratio <= 1 + WITHIN:
            best, low = net, share
        else:
            high = share
        if abs(ratio - 1) <= WITHIN:
            break
    if best is None:
        raise SystemExit("Torch-Pruning has no net that is as fast.")
    return best


def run_arm(arm: str, seed: int) -> None:
    """Run one arm with one seed, and Torch-Pruning at its latency."""
    done = {r["arm"] for r in rows(experiment="pretrained", seed=seed)}
    data = DATA["cifar10-jpeg"]
    folder = WORK / f"{arm}-seed{seed}"
    config = pretrained.config(data, **COMMON, **ARMS[arm], seed=seed)
    job = run.begin(folder, config)
    run.compress(job)
    metrics, example = job.folder.metrics(), job.example()
    dense, ours = job.dense().eval(), resconv.load(folder, trust_source=True)
    fused = resconv.fuse(dense, example, fold_norms=True)
    whole = resconv.profile(dense, example)

    def row(name: str, net: nn.Module, top1: float, **more: Any) -> None:
        size = resconv.profile(net, example)
        latency = {} if net is fused else {"ratio": ratios({"dense": fused, "net": net}, example)}
        if name in done:
            return
        add_row(
            {
                "experiment": "pretrained",
                "arm": name,
                "net": "efficientnet-lite0",
                "data": "CIFAR-10 (JPEG), 2,000 images, 96 px",
                "seed": seed,
                "top1": top1,
                "macs_share": round(size.macs / whole.macs, 4),
                "params_share": round(size.num_params / whole.num_params, 4),
                "latency_ratio": round(latency["ratio"]["net"], 4) if latency else 1.0,
            }
            | more
        )

    epochs = [DENSE_EPOCHS, SPARSE_EPOCHS, FINETUNE_EPOCHS]
    row("dense", fused, metrics.top1_dense, epochs=epochs[:1])
    row(arm, ours, metrics.top1_compact, epochs=epochs, top1_after_removal=metrics.top1_pruned)
    name = f"torch-pruning, as fast as {arm}"
    if name in done:
        return
    net = thinner(dense, ours, example)
    recipe = job.recipe(SPARSE_EPOCHS + FINETUNE_EPOCHS, config.finetune_rate())
    fit(net.train(), job.data, recipe, folder / "thinner", teacher=dense, progress=False)
    net = resconv.fuse(net.eval(), example, fold_norms=True)
    row(name, net, round(evaluate(net, job.data), 2), epochs=[DENSE_EPOCHS, recipe.epochs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    for seed in map(int, given.seeds.split(",")):
        run_arm(given.arm, seed)
    print(json.dumps([r["arm"] for r in rows(experiment="pretrained")]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(pretrained.__file__).parent))
    torch.set_num_threads(1)
    main()
