"""What the method itself costs: a fused layer, a training step, the surgery.

    python -m benchmarks.costs fused|by-hand|training-step|throughput|surgery-time|reach

Everything is timed in interleaved rounds; medians, as ratios to the plain net. Appends rows to ``results.jsonl``.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.nn import functional as F

import resconv
from resconv import nets
from resconv.latency.timing import onnx_runner, time_together, torch_runner, torch_threads
from resconv.nets.resnet import ResidualBlock, ResNet
from resconv.nn.gates import Segment, zeroed
from resconv.planning.costs import cost_model
from resconv.train import RecordedNet
from tests.helpers import randomise, randomise_gates

from .run import add_row

Row = dict[str, Any]


def _medians(
    calls: dict[str, Callable[[], Any]], repeats: int, warmup: int = 3
) -> dict[str, float]:
    return {n: t.median_ms for n, t in time_together(calls, repeats=repeats, warmup=warmup).items()}


def _runners(
    found: dict[str, nn.Module], x: torch.Tensor, folder: Path
) -> tuple[dict[str, Callable[[], Any]], dict[str, Path]]:
    """Return calls of each net in torch and in ONNX Runtime, on one thread."""
    files = {
        n: resconv.export(m, folder / f"{i}.onnx", x[:1]).path
        for i, (n, m) in enumerate(found.items())
    }
    calls = {f"torch/{n}": torch_runner(m, x) for n, m in found.items()}
    return calls | {f"onnxruntime/{n}": onnx_runner(f, x, 1) for n, f in files.items()}, files


def fused() -> Iterator[Row]:
    """C3: a fused ResConv is an ordinary conv, with the same operations and latency as the plain net."""
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in ("plainnet56", "resnet56", "vgg16_bn"):
        torch.manual_seed(0)
        plain = randomise(nets.create(name))
        trained = randomise_gates(resconv.convert(plain, x, units="layers"))
        found = {
            "plain": resconv.fuse(plain, x, fold_norms=True),
            "fused": resconv.fuse(trained, x, fold_norms=True),
        }
        error = resconv.verify(trained, found["fused"], x).max_rel_error
        with torch_threads(1), tempfile.TemporaryDirectory() as folder:
            calls, files = _runners(found, x, Path(folder))
            calls["torch/training form"] = torch_runner(trained, x)
            ops = [Counter(n.op_type for n in onnx.load(f).graph.node) for f in files.values()]
            ms = _medians(calls, 200, 10)
        yield {
            "net": name,
            "ResConvs": len(resconv.gates(trained)),
            "error": f"{error:.0e}",
            "ONNX operations": "the same" if ops[0] == ops[1] else "DIFFERENT",
            "fused, ONNX Runtime": round(ms["onnxruntime/fused"] / ms["onnxruntime/plain"], 3),
            "fused, torch": round(ms["torch/fused"] / ms["torch/plain"], 3),
            "training form, torch": round(ms["torch/training form"] / ms["torch/plain"], 3),
        }


def by_hand() -> Iterator[Row]:
    """Time a pruned net against the same shallow net written by hand."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    gated = resconv.convert(nets.create("resnet56").eval(), x, units="blocks")
    # Keep three blocks of nine in each stage; the first ones, as the hand-written net has them.
    drop = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3, 9))
    compact = resconv.fuse(resconv.prune(gated, resconv.Plan(drop)), x, fold_norms=True)
    written = resconv.fuse(ResNet(ResidualBlock, 3).eval(), x, fold_norms=True)
    assert resconv.profile(compact, x) == resconv.profile(written, x)
    for batch in (1, 32):
        inputs = torch.randn(batch, 3, 32, 32)
        with torch_threads(1), tempfile.TemporaryDirectory() as folder:
            calls, _ = _runners({"compact": compact, "by hand": written}, inputs, Path(folder))
            ms = _medians(calls, 300 if batch == 1 else 60, 10)
        for runtime in ("torch", "onnxruntime"):
            a, b = ms[f"{runtime}/compact"], ms[f"{runtime}/by hand"]
            yield {
                "runtime": runtime,
                "batch": batch,
                "compact (ms)": round(a, 3),
                "by hand (ms)": round(b, 3),
                "ratio": round(a / b, 3),
            }


def _step(model: nn.Module, forward: Any, x: Any, bf16: bool, total: int | None) -> Any:
    """Return a call that takes one training step, under a Sparsifier where ``total`` steps are given."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if total is not None:
        sparsifier = resconv.Sparsifier(model, target=resconv.Budget(macs=0.5), total_steps=total)
        sparsifier.attach(optimizer)
    labels = torch.arange(len(x), device=x.device) % 10

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(forward(x).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def training_step() -> Iterator[Row]:
    """Time one step of the training forms against the plain net's, batch 128."""
    arrived = "all + Sparsifier, at 50 % of the MACs"
    for name, bf16, start in (
        (name, bf16, start)
        for name, bf16 in (("resnet20", False), ("resnet20", True), ("resnet56", True))
        for start in ("keep", "identity")
    ):
        torch.manual_seed(0)
        layout = torch.channels_last if bf16 else torch.contiguous_format
        x = torch.randn(128, 3, 32, 32).to(memory_format=layout)
        base = nets.create(name)
        steps = {}
        for arm in ("plain", "blocks", "layers", "all", "all + Sparsifier", arrived):
            model = base
            if arm != "plain":
                model = resconv.convert(base, x[:2], units=arm.split()[0], start=start)
            model = model.train().to(memory_format=layout)
            total = None if "Sparsifier" not in arm else 20 if arm == arrived else 100_000
            steps[arm] = _step(model, model, x, bf16, total)
            for _ in range(20 if arm == arrived else 0):
                steps[arm]()
        ms = _medians(steps, 6, 1)
        yield {
            "net": name,
            "start": start,
            "format": "bf16, channels last" if bf16 else "float32",
            "plain (ms)": round(ms["plain"]),
        } | {a: round(ms[a] / ms["plain"], 3) for a in steps if a != "plain"}


def throughput() -> Iterator[Row]:
    """Time the same training step run eagerly, compiled and recorded as CUDA graphs."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    steps = {}
    for name, bf16, how in (
        ("float32, eager", False, None),
        ("bf16, channels last, eager", True, None),
        ("bf16, channels last, recorded", True, "recorded"),
        ("bf16, channels last, compiled", True, "default"),
        ("bf16, channels last, compiled and recorded", True, "reduce-overhead"),
    ):
        if how in ("recorded", "reduce-overhead") and not cuda:
            continue
        torch.manual_seed(0)
        layout = torch.channels_last if bf16 else torch.contiguous_format
        example = torch.randn(2, 3, 32, 32)
        model = resconv.convert(nets.create("resnet56"), example, units="all").train()
        model = model.to(device, memory_format=layout)
        x = torch.randn(128, 3, 32, 32, device=device).to(memory_format=layout)
        forward: Any = model
        if how is not None:
            forward = RecordedNet(model) if how == "recorded" else torch.compile(model, mode=how)
        steps[name] = _step(model, forward, x, bf16, 100_000)
    ms = _medians(steps, 100 if cuda else 8)
    for name, taken in ms.items():
        yield {
            "net": "resnet56",
            "step": name,
            "ms": round(taken, 1),
            "images/s": round(128e3 / taken),
            "against eager float32": round(ms["float32, eager"] / taken, 2),
        }


def surgery_time() -> Iterator[Row]:
    """Time convert + plan + prune of a large net against one forward pass of batch 8 at 224 px."""
    torch.manual_seed(0)
    name = "torchvision:resnet152"
    model = nets.create(name).eval()
    x = torch.randn(1, 3, 224, 224)
    gated = resconv.convert(model, x, units="all")
    every = list(resconv.gates(gated).values())
    with torch.no_grad():
        for i, gate in enumerate(every):
            gate.scale.fill_(0.1 + i / len(every))
            if gate.control is not None:
                gate.control.fill_(0.9)
    budget = resconv.Budget(macs=0.6)
    plan = resconv.plan(gated, x, budget)
    calls = {
        "forward": torch_runner(model, torch.randn(8, 3, 224, 224)),
        "convert": lambda: resconv.convert(model, x, units="all"),
        "plan": lambda: resconv.plan(gated, x, budget),
        "prune": lambda: resconv.prune(gated, plan),
    }
    ms = _medians(calls, 3, 0)
    surgery = sum(ms[k] for k in ("convert", "plan", "prune"))
    yield {
        "net": name,
        "units removed": f"{len(plan.remove)} of {len(every)}",
        **{f"{k} (ms)": round(v) for k, v in ms.items()},
        "ratio": round(surgery / ms["forward"], 2),
    }


_REACH = (
    ("torchvision:resnet18", 224),
    ("torchvision:resnet50", 224),
    ("torchvision:mobilenet_v2", 224),
    ("torchvision:mobilenet_v3_small", 224),
    ("timm:mobilenetv3_large_100", 224),
    ("timm:efficientnet_lite0", 224),
    ("timm:tf_efficientnetv2_b0", 192),
    ("torchvision:efficientnet_b0", 224),
    ("torchvision:regnet_y_400mf", 224),
    ("torchvision:densenet121", 224),
    ("torchvision:vgg16_bn", 224),
    ("torchvision:squeezenet1_1", 224),
    ("torchvision:googlenet", 224),
    ("torchvision:shufflenet_v2_x1_0", 224),
    ("timm:convnext_atto", 224),
    ("benchmarks.costs:unet", 96),
)


class _DoubleConv(nn.Sequential):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )


class _UNet(nn.Module):
    """Four levels, concatenations, as in Ronneberger et al. 2015 with padded convs."""

    def __init__(self, width: int = 32, levels: int = 4) -> None:
        super().__init__()
        widths = [width << i for i in range(levels)]
        self.down = nn.ModuleList(
            _DoubleConv(a, b) for a, b in zip([3, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.merge = nn.ModuleList(_DoubleConv(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else self.pool(x))
            kept.append(x)
        for level, up, merge in zip(
            kept[-2::-1], reversed(self.up), reversed(self.merge), strict=True
        ):
            x = merge(torch.cat([level, up(x)], 1))
        return self.head(x)


def unet() -> nn.Module:
    return _UNet()


def reach(*only: str) -> Iterator[Row]:
    """Count the units of each net and what is left with all of them gone: identities alone, and all kinds.

    Each smallest net is made, its outputs are compared with those of the gated net, and it is timed in
    ONNX Runtime on one thread beside the whole net.
    """
    for name, side in _REACH:
        if only and name.partition(":")[2] not in only:
            continue
        torch.manual_seed(0)
        net = unet() if name.endswith(":unet") else nets.create(name)
        x = torch.randn(2, 3, side, side)
        net = randomise(net.eval(), 0, x)
        row: Row = {"net": name.partition(":")[2], "side": side}
        x = x[:1]
        made = {"dense": net}
        row["MACs (M)"] = round(resconv.profile(net, x).macs / 1e6)
        for how, units in (("before", ("layers", "blocks")), ("after", "all")):
            try:
                gated = resconv.convert(net, x, units=units, start="identity")
            except resconv.ResConvError:
                row |= {f"units {how}": 0, f"left {how}": 1.0}
                continue
            costs = cost_model(gated, x)
            going = costs.compatible(costs.names)
            with torch.no_grad():
                for gate in resconv.gates(gated).values():
                    if gate.control is not None:
                        gate.control.fill_(1.0)
                    if isinstance(gate, Segment):  # a start at zero would prove nothing
                        for layer in gate.left.modules():
                            getattr(layer, "reset_parameters", lambda: None)()
            compact = resconv.prune(gated, resconv.Plan(going))
            with zeroed(gated, going):
                error = resconv.verify(gated, compact, x).max_rel_error
            made[how] = compact
            macs = resconv.profile(compact, x).macs
            row |= {
                f"units {how}": len(costs.names),
                f"left {how}": round(macs / costs.macs, 4),
                f"error {how}": f"{error:.0e}",
            }
        with tempfile.TemporaryDirectory() as folder:
            files = {
                n: resconv.export(m, Path(folder) / f"{n}.onnx", x).path for n, m in made.items()
            }
            ms = _medians({n: onnx_runner(f, x, 1) for n, f in files.items()}, 30)
        row |= {f"latency {n}": round(ms[n] / ms["dense"], 4) for n in made if n != "dense"}
        kinds = Counter(kind.partition(":")[0] for kind in costs.kinds.values())
        yield row | {"kinds after": dict(kinds)}


QUESTIONS = {f.__name__.replace("_", "-"): f for f in (fused, by_hand, training_step, throughput)}
QUESTIONS |= {"surgery-time": surgery_time, "reach": reach}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs")
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--nets", nargs="*", default=(), help="reach: only nets of these names")
    asked = parser.parse_args()
    question, calls = asked.question, QUESTIONS | {"reach": lambda: reach(*asked.nets)}
    command = f"python -m benchmarks.costs {question}"
    for row in calls[question]():
        add_row({"experiment": question, "command": command} | row)


if __name__ == "__main__":
    main()
